"""Schedules of MAR and Hi-MAR: step sizes of sampling, masking laws, learning rates and weight decay."""

import dataclasses
import json
from itertools import pairwise
from typing import Any

import golden
import pytest
import torch

from hmar_cli.builders import build_model
from hmar_cli.checkpoints.published_masked import masked_table
from hmar_cli.recipe import load_recipe
from hmar_cli.sampling.masked import guidance, mask_lengths
from hmar_cli.settings import Data, Kl, MaskedAr, MaskedArObjective, Masking, Optim, Recipe
from hmar_cli.training.masked import MaskedArTraining, mask_ratio, masked_count, pivot_drop
from hmar_cli.training.schedules import learning_rate_factor

(PATH,) = golden.fixtures_of("schedules")
RECORDED: dict[str, Any] = json.loads(PATH.read_text())
RELATIVE = RECORDED["tolerance"]["default"]
SAMPLING = {**RECORDED["mar_sampling"], **RECORDED["himar_sampling"]}
LAWS: dict[str, tuple[Masking, float]] = {
    "mask_ratio_truncated_gaussian_min_0.7": ("truncated-normal", 0.7),
    "mask_ratio_truncated_gaussian_min_0.38": ("truncated-normal", 0.38),
    "mask_ratio_cosine": ("cosine", 0.7),
}
PER_EPOCH = 1000  # steps, so that every recorded epoch falls on one


def exactly(value: float) -> Any:
    return pytest.approx(value, rel=RELATIVE)


@pytest.mark.parametrize("name", SAMPLING)
def test_steps_and_guidance_of_sampling(name: str) -> None:
    run = SAMPLING[name]
    lengths = mask_lengths(run["tokens"], run.get("num_iter") or len(run["mask_len_after_iteration"]))
    assert lengths == run["mask_len_after_iteration"]
    drawn = [before - after for before, after in pairwise([run["tokens"], *lengths[:-1], 0])]
    assert drawn == run.get("predicted_per_iteration", run.get("newly_unmasked"))
    cfg = run.get("cfg", run.get("re_cfg"))
    found = [guidance(cfg, "linear", run["tokens"], masked) for masked in lengths]
    assert found == [exactly(value) for value in run["cfg_at_iteration"]]
    assert guidance(cfg, "constant", run["tokens"], lengths[0]) == cfg


@pytest.mark.parametrize("name", LAWS)
def test_quantiles_of_the_masking_laws(name: str) -> None:
    law, lowest = LAWS[name]
    for share, ratio in RECORDED[name]["quantiles"].items():
        assert mask_ratio(law, float(share), lowest) == exactly(ratio)


def below(law: Masking, ratio: float) -> float:
    """The probability of a ratio of at most `ratio`: the inverse of the quantile function, by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mask_ratio(law, middle) <= ratio else (low, middle)
    return low


@pytest.mark.parametrize("name", ["mask_ratio_truncated_gaussian_min_0.7", "mask_ratio_cosine"])
@pytest.mark.parametrize("total", [64, 256])
def test_counts_of_masked_tokens(name: str, total: int) -> None:
    law, recorded = LAWS[name][0], RECORDED[name][f"masked_count_{total}"]
    more = [1 - below(law, count / total) for count in range(total)]  # the probability of masking more
    assert sum(more) == exactly(recorded["mean"])
    assert more[-1] == exactly(recorded["p_all_masked"])
    assert masked_count(total, law, 1e-12) == recorded["min"]
    assert masked_count(total, law, 1 - more[-1] + 1e-9) == total
    assert masked_count(total, law, 1 - more[-1] - 1e-9) == total - 1


@pytest.mark.parametrize("name", RECORDED["lr"]["values"])
def test_learning_rates(name: str) -> None:
    recorded = {float(epoch): rate for epoch, rate in RECORDED["lr"]["values"][name].items()}
    short = name.startswith("cosine_min")  # to 1e-5 in 60 epochs, 10 of them warm-up
    epochs, warm, end = (60, 10, 1e-5 / 8e-4) if short else (400, 100, 0.0)
    settings = Optim(
        base_lr=1e-4,
        schedule="constant" if name == "constant" else "cos",
        warmup_steps=warm * PER_EPOCH,
        start_ratio=0.0,
        end_ratio=end,
    )
    share = dataclasses.replace(settings, warmup_steps=0, warmup=warm / epochs)
    for epoch, rate in recorded.items():
        step, steps = round(epoch * PER_EPOCH), epochs * PER_EPOCH + 1
        assert settings.base_lr * 2048 / 256 * learning_rate_factor(settings, step, steps) == exactly(rate)
        assert learning_rate_factor(share, step, steps) == learning_rate_factor(settings, step, steps)


@pytest.mark.parametrize("name", ["mar-b", "mar-h", "himar-b", "himar-h"])
def test_published_recipes_warm_up_as_recorded(name: str) -> None:
    recipe = load_recipe(name)
    steps = int(recipe.train.epochs) * PER_EPOCH
    peak = recipe.optim.base_lr * recipe.train.batch_size / 256
    for epoch, rate in RECORDED["lr"]["values"]["constant"].items():
        step = round(float(epoch) * PER_EPOCH)
        assert peak * learning_rate_factor(recipe.optim, step, steps) == exactly(rate)


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_how_many_images_miss_their_pivots(rate: float) -> None:
    recorded = RECORDED["himar_conditional_token_drop"][f"p_drop_at_rate_{str(rate).replace('.', '_')}"]
    for epoch, probability in recorded.items():
        assert pivot_drop(float(epoch), rate, 100) == exactly(probability)


@pytest.mark.parametrize(("family", "pivots"), [("mar", "none"), ("himar", "conditional")])
def test_groups_of_weight_decay(family: str, pivots: Any) -> None:
    recorded = RECORDED[f"weight_decay_{family}"]
    depth, width = 2, 64
    model = MaskedAr(
        pivots=pivots,
        encoder_depth=depth,
        decoder_depth=depth,
        width=width,
        heads=4,
        scale_vector="table" if family == "himar" else "none",
        pivot_head_depth=depth,
        pivot_head_width=width,
        dense_head="transformer" if family == "himar" else "mlp",
        dense_head_depth=depth,
        dense_head_width=width,
        num_classes=10,
    )
    recipe = Recipe(data=Data(size=64, pivot_size=32), tokenizer=Kl(), model=model)
    with torch.device("meta"):
        network = build_model(recipe)
    objective = MaskedArTraining(network, MaskedArObjective(), 1.0)  # type: ignore[arg-type]
    groups: dict[bool, set[str]] = {True: set(), False: set()}
    for name, parameter in objective.model.named_parameters():
        groups[objective.undecayed(name, parameter)].add(name)

    def ours(keys: list[str]) -> set[str]:
        return {str(masked_table(objective.model.phases).ours(key)) for key in keys}

    assert groups[True] == ours(recorded["zero_decay"])
    assert groups[False] == ours(recorded["decayed"])
    assert all(masked_table(2).ours(key) is None for key in recorded["not_in_optimizer"])

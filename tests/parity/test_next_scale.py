"""VAR, HMAR's next-scale, masked and merged models against what their published formats compute."""

from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from torch import Tensor

from hmar_cli.builders import build_model, build_tokenizer
from hmar_cli.checkpoints.published import (
    Imported,
    merge,
    model_settings,
    read_msvq,
    read_transformer,
    tokenizer_settings,
)
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.sampling.next_scale import sample_next_scale
from hmar_cli.settings import NextScaleSample, Recipe
from hmar_cli.tokenizers.msvq import MultiScaleVQ

PATTERNS = {"var": "causal", "hmar-nsp": "diagonal", "hmar-mp": "diagonal", "hmar-full": "diagonal"}


class Greedy:
    """Takes the most probable token: no random numbers are compared."""

    def draw(self, probabilities: Tensor, step: int) -> Tensor:
        """Arg-max of [B, n, V] over V."""
        return probabilities.argmax(dim=-1)


class Case:
    """A fixture with its model and tokenizer, read by the same readers that `hmar checkpoint import` uses."""

    def __init__(self, path: Path) -> None:
        self.about, self.tensors = golden.load_fixture(path)
        state = golden.part(self.tensors, "state.")
        vq = read_msvq(golden.part(state, "vae."))
        imported = read_transformer(state)
        if imported.format == "masked":
            imported = self.stand_alone(imported)
        model, objective = model_settings(imported, PATTERNS[self.about["family"]])
        sides = tuple(self.about["config"]["vae"]["v_patch_nums"])
        recipe = Recipe(tokenizer=tokenizer_settings(vq, sides), model=model, objective=objective)
        self.tokenizer: MultiScaleVQ = build_tokenizer(recipe.tokenizer).eval()
        self.tokenizer.load_state_dict(vq.state)
        self.model: NextScaleTransformer = build_model(recipe).eval()
        self.model.load_state_dict(imported.state)

    def stand_alone(self, masked: Imported) -> Imported:
        """Give a masked model its own late blocks as the next-scale branch, as masked finetuning starts."""
        state = {k: v for k, v in masked.state.items() if k != "masked.mask_embed"}
        layers = self.about["config"]["transformer"]["n_layers_train"]
        return merge(Imported("next-scale", state), masked, layers)

    def close(self, actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, **golden.tolerance(self.about))


@pytest.mark.parametrize("path", golden.fixtures_of("var", "hmar-nsp"), ids=golden.fixture_id)
@torch.inference_mode()
def test_teacher_forced_logits(path: Path) -> None:
    case = Case(path)
    case.close(case.model(case.tensors["in.labels"], case.tensors["in.x"]), case.tensors["out.logits"])


@pytest.mark.parametrize("path", golden.fixtures_of("hmar-mp"), ids=golden.fixture_id)
@torch.inference_mode()
def test_masked_logits(path: Path) -> None:
    case = Case(path)
    inputs, own = case.tensors["in.x"].chunk(2)
    mask = torch.zeros(inputs.shape[1], dtype=torch.bool)
    mask[case.tensors["in.idx_to_mask"]] = True
    case.close(case.model(case.tensors["in.labels"], inputs, own, mask), case.tensors["out.logits"])


def generations() -> list[Any]:
    return [
        pytest.param(path, name, id=f"{path.stem}-{name}")
        for path in golden.fixtures_of("var", "hmar-nsp", "hmar-full")
        for name in golden.load_fixture(path)[0]["config"]["generations"]
    ]


@pytest.mark.parametrize(("path", "name"), generations())
def test_generation(path: Path, name: str) -> None:
    case = Case(path)
    run = case.about["config"]["generations"][name]
    settings = NextScaleSample(
        cfg=run["cfg"],
        top_k=run["top_k"],
        top_p=run["top_p"],
        refine_cfg=run["cfg"] * 1e-6,
        schedule=tuple(tuple(passes) for passes in run.get("mask_schedule") or ()),
    )
    got: dict[str, Tensor] = {}
    labels = case.tensors["in.gen_labels"]
    _, f_hat = sample_next_scale(
        case.model, case.tokenizer.quantizer, labels, settings, Greedy(), trace=got.__setitem__
    )
    with torch.inference_mode():
        got["image"] = (case.tokenizer.decode(f_hat) + 1) / 2
    expected = golden.part(case.tensors, f"out.{name}.")
    assert expected
    for key, value in expected.items():
        actual = got[key]
        if value.dtype == torch.int64:
            assert torch.equal(actual, value), key
            continue
        if key.startswith("conf.") and not key.endswith(
            ".1"
        ):  # only what the last pass redrew is a candidate
            _, scale, number = key.split(".")
            candidates = expected[f"masked.{scale}.{int(number) - 1}"]
            actual, value = actual.gather(1, candidates), value.gather(1, candidates)
        case.close(actual, value)

"""MAR and Hi-MAR from images to images, by the commands alone, at the smallest size that shows every step."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_runs import JOINT_TEXT, KL, MASKED_AR, NO_PIVOTS, hmar

TOKENIZER = f"""
[data]
source = "builtin:scenes?count=40"
size = 16
pivot_size = 8
mirror = false
{KL}
[objective]
kind = "kl"
perceptual = "none"
[train]
batch_size = 8
steps = 2
log_every = 1
save_every = 2
sample_every = 2
"""
MODEL = f"""
[data]
extends = "./kl.toml"
[tokenizer]
extends = "./kl.toml"
{MASKED_AR}
[objective]
kind = "masked-ar"
[optim]
base_lr = 0.3  # heads begin with zeros: two small steps would not show in an image
warmup = 0.0
[train]
batch_size = 8
steps = 2
log_every = 1
save_every = 2
sample_every = 2
ema = 0.1
[sample]
kind = "masked-ar"
steps = 3
pivot_steps = 4
head_steps = 4
pivot_head_steps = 4
"""
TEXT = f'extends = "./himar.toml"\n{JOINT_TEXT}'
MAR = f'extends = "./himar.toml"\n[model]\n{NO_PIVOTS}'


def done(*arguments: object) -> Any:
    result = hmar(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipes, a tokenizer, a cache with captions, and one checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("masked")
    for name, text in (("kl", TOKENIZER), ("himar", MODEL), ("text", TEXT), ("mar", MAR)):
        (folder / f"{name}.toml").write_text(text)
    done("train", "--recipe", folder / "kl.toml", "--out", folder / "kl", "--device", "cpu")
    tokenize = ("tokenize", "--tokenizer", folder / "kl", "--recipe", folder / "text.toml")
    done(*tokenize, "--out", folder / "cache", "--device", "cpu")
    for name in ("himar", "text", "mar"):
        train = ("train", "--recipe", folder / f"{name}.toml", "--data", folder / "cache")
        done(*train, "--out", folder / name, "--device", "cpu")
    return folder


def sample(world: Path, name: str, out: Path, *flags: object) -> Any:
    return hmar("sample", "--checkpoint", world / name, "--out", out, "--device", "cpu", "--json", *flags)


def pictures(folder: Path, pattern: str = "??????.png") -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob(pattern))])


def test_both_losses_are_logged_apart(world: Path) -> None:
    rows = [json.loads(line) for line in (world / "himar" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["pivot_loss"] > 0 and row["dense_loss"] > 0 for row in rows if "loss" in row)
    row = rows[-1]
    assert row["loss"] == pytest.approx(0.4 * row["pivot_loss"] + 0.6 * row["dense_loss"], rel=1e-4)
    assert (world / "himar" / "samples" / "step-00000002.png").is_file()


def test_curves_of_either_loss(world: Path, tmp_path: Path) -> None:
    done("curves", world / "himar", "--metric", "dense_loss", "--out", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 100


def test_the_latent_scale_travels_with_the_model(world: Path) -> None:
    scale = json.loads((world / "cache" / "manifest.json").read_text())["latent_scale"]
    assert scale > 0
    carried = next((world / "himar").glob("step-*")) / "tokenizer" / "recipe.toml"
    assert f"latent_scale = {scale}" in carried.read_text()


@pytest.mark.parametrize("name", ["himar", "mar"])
def test_samples_depend_on_seed_and_index_alone(world: Path, tmp_path: Path, name: str) -> None:
    runs = {"one": ("--batch-size", 1), "three": ("--batch-size", 3), "again": ("--seed", 1)}
    for out, flags in runs.items():
        assert sample(world, name, tmp_path / out, "--count", 4, *flags).exit_code == 0
    one, three, again = (pictures(tmp_path / out).astype(int) for out in runs)
    assert one.shape == (4, 16, 16, 3)
    assert np.abs(one - three).max() <= 1  # sums are rounded in another order in another batch
    assert np.abs(one - again).max() > 1


def test_pivots_are_written_beside_the_images(world: Path, tmp_path: Path) -> None:
    assert sample(world, "himar", tmp_path / "a", "--count", 2, "--pivots").exit_code == 0
    assert pictures(tmp_path / "a", "0*-pivots.png").shape == (2, 8, 8, 3)
    assert (tmp_path / "a" / "grid-pivots.png").is_file()
    for flags in (("--pivots",), ("--pivot-cfg", 2), ("--pivot-steps", 2)):
        refused = sample(world, "mar", tmp_path / "b", *flags)
        assert refused.exit_code == 2 and "has no pivots" in " ".join(refused.stderr.split())


def test_guidance_of_phase_two_alone_can_be_off(world: Path, tmp_path: Path) -> None:
    for out, flags in {"on": (), "off": ("--cfg", 1)}.items():
        assert sample(world, "himar", tmp_path / out, "--count", 2, "--pivots", *flags).exit_code == 0
    assert (pictures(tmp_path / "on", "0*-pivots.png") == pictures(tmp_path / "off", "0*-pivots.png")).all()
    assert (pictures(tmp_path / "on") != pictures(tmp_path / "off")).any()


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_fast_samplers_take_twenty_steps_by_default(world: Path, tmp_path: Path, sampler: str) -> None:
    result = sample(world, "himar", tmp_path / "a", "--count", 1, "--head-sampler", sampler)
    assert result.exit_code == 0, result.output
    about = json.loads(result.stdout)
    assert (about["head_steps"], about["pivot_head_steps"]) == (20, 20)
    assert len(pictures(tmp_path / "a")) == 1


def test_ddpm_steps_are_not_those_of_a_fast_sampler(world: Path, tmp_path: Path) -> None:
    fast = tmp_path / "fast"
    shutil.copytree(world / "mar", fast)
    for recipe in fast.glob("step-*/recipe.toml"):
        recipe.write_text(recipe.read_text().replace('head_sampler = "ddpm"', 'head_sampler = "dpm++"'))
    flags = ("--checkpoint", fast, "--head-sampler", "ddpm", "--out", tmp_path / "a", "--dry-run", "--json")
    about = json.loads(done("sample", *flags).stdout)
    assert (about["head_steps"], about["pivot_head_steps"]) == (250, 100)


def test_a_tokenizer_without_a_scale_takes_that_of_the_model(world: Path, tmp_path: Path) -> None:
    for out, flags in {"own": (), "given": ("--tokenizer", world / "kl")}.items():
        result = sample(world, "mar", tmp_path / out, "--count", 1, *flags)
        assert result.exit_code == 0, result.output
    assert (pictures(tmp_path / "own") == pictures(tmp_path / "given")).all()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--top-k", 5), "is a MAR or Hi-MAR, which has no --top-k"),
        (
            ("--steps", 65),
            "error: --steps 65: 65 steps for 8x8 tokens; at most one a token hint: at most --steps 64",
        ),
        (("--pivot-steps", 17), "at most one a token hint: at most --pivot-steps 16"),
        (
            ("--head-sampler", "dpm++", "--temperature", 0.9),
            'error: --temperature 0.9: it scales the noise of "ddpm"; "dpm++" adds none '
            "hint: leave out --temperature, or add --head-sampler ddpm",
        ),
        (
            ("--steps", 65, "--pivot-steps", 17),
            "cannot be followed --steps 65: 65 steps for 8x8 tokens; at most one a token --pivot-steps 17: 17",
        ),
        (("--prompt", "a red circle"), "draws classes and knows no text"),
        (("--text-weights", "x.safetensors"), "reads no text through CLIP"),
        (("--labels", "cat"), "no class 'cat'"),
    ],
)
def test_flags_that_cannot_be_followed(world: Path, tmp_path: Path, flags: Any, line: str) -> None:
    result = sample(world, "himar", tmp_path / "a", *flags)
    assert result.exit_code == 2
    assert line in " ".join(result.stderr.split())
    assert not (tmp_path / "a").exists()


def test_prompts_from_flags_and_file(world: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a green star above a red circle\n\n")
    flags = ("--prompt", "a red circle left of a blue square", "--prompt-file", tmp_path / "prompts.txt")
    result = sample(world, "text", tmp_path / "a", *flags)
    assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "a" / "sample.json").read_text())
    assert about["prompts"] == ["a red circle left of a blue square", "a green star above a red circle"]
    images = pictures(tmp_path / "a")
    assert images.shape == (2, 16, 16, 3)
    verdict = json.loads(done("eval", "scenes", tmp_path / "a", "--json").stdout)
    assert verdict
    missing = sample(world, "text", tmp_path / "b")
    assert missing.exit_code == 2 and "draws what a text says" in " ".join(missing.stderr.split())


def test_a_cache_that_does_not_fit_is_refused(world: Path, tmp_path: Path) -> None:
    wrong = ("--set", "data.pivot_size=4", "--set", "text.context_length=9")
    result = hmar(
        "train", "--recipe", world / "text.toml", *wrong, "--data", world / "cache", "--out", tmp_path / "a"
    )
    assert result.exit_code == 2
    text = " ".join(result.stderr.split())
    assert "pivots: 4x4 in the cache, 2x2 in the recipe" in text
    assert "text: ids:12 in the cache, ids:9 in the recipe" in text


def test_a_cache_of_the_other_kind_is_refused(world: Path, tmp_path: Path) -> None:
    train = ("train", "--recipe", "hmar-tiny", "--data", world / "cache", "--out", tmp_path / "a")
    result = hmar(*train)
    assert result.exit_code == 2
    assert "contents: latents in the cache, tokens in the recipe" in " ".join(result.stderr.split())


def test_weights_of_another_latent_scale_are_no_start(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world / "mar", other)
    for recipe in other.glob("step-*/recipe.toml"):
        text = recipe.read_text()
        recipe.write_text(re.sub(r"latent_scale = [\d.]+", "latent_scale = 0.125", text))
    train = ("train", "--recipe", world / "mar.toml", "--data", world / "cache", "--out", tmp_path / "a")
    refused = hmar(*train, "--init", other)
    assert refused.exit_code == 2 and "latents of scale 0.125" in " ".join(refused.stderr.split())
    done(*train, "--init", world / "mar", "--device", "cpu")


def test_a_model_of_the_other_family_cannot_be_the_start(world: Path, tmp_path: Path) -> None:
    arguments = ("train", "--recipe", world / "mar.toml", "--data", world / "cache", "--out", tmp_path / "a")
    result = hmar(*arguments, "--init", world / "kl")
    assert result.exit_code == 2 and "holds a kl" in result.stderr


def test_resumed_training_gives_the_same_weights(world: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train = ("train", "--recipe", world / "himar.toml", "--data", world / "cache", "--device", "cpu")
    every = ("--set", "train.save_every=1", "--set", "train.keep=9")
    done(*train, "--out", tmp_path / "whole", *every)
    done(*train, "--out", tmp_path / "part", *every)
    shutil.rmtree(tmp_path / "part" / "step-00000002")
    done(*train, "--out", tmp_path / "part", *every, "--resume")
    whole, part = (
        load_file(tmp_path / name / "step-00000002" / "model.safetensors") for name in ("whole", "part")
    )
    assert all((whole[name] == part[name]).all() for name in whole)

"""`hmar checkpoint import` of MAR, Hi-MAR and KL-16, from files as their authors write them."""

import argparse
import json
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from torch import Tensor
from toy_runs import GOLDEN, hmar

from hmar_cli.builders import load_model, load_tokenizer
from hmar_cli.checkpoints.published_masked import read_kl, read_masked
from hmar_cli.checkpoints.store import open_checkpoint
from hmar_cli.files import file_sha256


def bring(folder: Path, name: str, format: str, out: Path, *more: object) -> Any:
    return hmar("checkpoint", "import", folder / name, "--format", format, "--out", out, *more)


def refused(result: Any, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def fixture_state(name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = golden.part(golden.load_fixture(golden.folder() / f"{name}.json")[1], "state.")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published files: kl16.ckpt, and a training checkpoint of each model with recipes of their sizes."""
    folder = tmp_path_factory.mktemp("published")
    torch.save({"model": fixture_state("klvae-a") | {"loss.logvar": torch.zeros(())}}, folder / "kl16.ckpt")
    for family in GOLDEN:
        state = fixture_state(f"{family}-a")
        content = {
            "model": state,
            "model_ema": {k: v + 1 for k, v in state.items()},
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 399,
            "args": argparse.Namespace(model=f"{family}_tiny", blr=1e-4),
        }
        torch.save(content, folder / f"{family}.pth")
        torch.save(state, folder / f"{family}-plain.pth")
        (folder / f"{family}.toml").write_text(GOLDEN[family])
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "kl-16"
    result = bring(folder, "kl16.ckpt", "kl", out)
    assert result.exit_code == 0, result.output
    return out


def rows(table: str) -> dict[str, str]:
    """The table of `hmar checkpoint inspect`; what goes on in another line is left out."""
    cells = (line.split("│")[1:3] for line in table.splitlines() if "│" in line)
    return {name.strip(): value.strip() for name, value in cells if name.strip()}


def test_kl16(folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    result = bring(folder, "kl16.ckpt", "kl", tmp_path / "again", "--json")
    account = json.loads(result.stdout)
    state = fixture_state("klvae-a")
    # q, k and v of three attentions, weight and bias each, become one
    assert (account["imported"], account["unused"]) == (len(state) - 2 * 2 * 3, ["loss.logvar"])
    assert account["licence"].startswith("MIT") and "MIT" in result.stderr
    about = json.loads(hmar("checkpoint", "inspect", tokenizer, "--json").stdout)
    assert (about["kind"], about["recipe"], about["latent_scale"]) == ("kl", "kl-16", 0.2325)
    assert (about["grid"], about["latent_channels"]) == ([16, 16], 16)
    assert about["source"]["sha256"] == file_sha256(folder / "kl16.ckpt")
    shown = rows(hmar("checkpoint", "inspect", tokenizer).stdout)
    assert shown["weights"] == "model" and not {"tokenizer", "class names", "masked branch"} & shown.keys()
    codec = load_tokenizer(tokenizer)
    assert about["tokenizer_hash"] == codec.fingerprint()
    expected = read_kl(state).state
    assert all(torch.equal(value, expected[name]) for name, value in codec.state_dict().items())


@pytest.mark.parametrize(("family", "licence"), [("mar", "MIT"), ("himar", "none stated")])
def test_raw_and_averaged_weights(
    folder: Path, tokenizer: Path, tmp_path: Path, family: str, licence: str
) -> None:
    out, more = tmp_path / "out", ("--recipe", folder / f"{family}.toml", "--tokenizer", tokenizer)
    result = bring(folder, f"{family}.pth", family, out, *more, "--json")
    assert result.exit_code == 0, result.output
    account, state = json.loads(result.stdout), fixture_state(f"{family}-a")
    assert account["imported"] + len(account["derived"]) == len(state)
    assert licence in result.stderr and licence in account["licence"]
    about = json.loads(hmar("checkpoint", "inspect", out, "--json").stdout)
    assert (about["kind"], about["weights"], about["classes"]) == ("masked-ar", ["model", "ema"], 10)
    assert (about["tokenizer"], about["latent_scale"]) == ("carried", 0.2325)
    assert about["pivot_grid"] == ([4, 4] if family == "himar" else None)
    assert licence in about["licence"]
    shown = rows(hmar("checkpoint", "inspect", out).stdout)
    grids = [shown.get("grid"), shown.get("pivot grid")]
    assert grids == (["8x8", "4x4"] if family == "himar" else ["4x4", None])
    assert (shown["weights"], shown["resumable"]) == ("model, ema", "no")
    assert "masked branch" not in shown and shown["source"].startswith(f"file {family}.pth, sha256")
    expected = read_masked(state).state
    for which, shift in (("", 1), ("ema", 1), ("model", 0)):  # averaged ones are drawn with by default
        model, codec, _ = load_model(out, which)
        assert codec.latent_scale == 0.2325
        found = {k: v for k, v in model.state_dict().items() if k in expected}
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name] + shift) for name, value in found.items())


def test_a_plain_state_dict_has_one_set_of_weights(folder: Path, tmp_path: Path) -> None:
    result = bring(folder, "mar-plain.pth", "mar", tmp_path / "out", "--recipe", folder / "mar.toml")
    assert result.exit_code == 0, result.output
    assert "no --tokenizer was given" in result.stderr
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (checkpoint.weights, checkpoint.tokenizer) == (("model",), None)


def test_what_does_not_fit_is_refused(folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", ("--recipe", folder / "mar.toml")
    refused(bring(folder, "mar.pth", "mar", out), "no published mar has width 64", "--recipe")
    refused(bring(folder, "mar.pth", "mar", out, "--recipe", "hmar-tiny"), "is not of a MAR or Hi-MAR")
    refused(bring(folder, "mar.pth", "mar", out, "--recipe", "mar-b"), "don't fit their recipe")
    refused(bring(folder, "mar.pth", "himar", out, *recipe), "is of the format mar", "--format mar")
    refused(bring(folder, "himar.pth", "mar", out, *recipe), "is of the format himar", "--format himar")
    refused(bring(folder, "kl16.ckpt", "mar", out), "don't belong to the published mar format", "is kl")
    refused(bring(folder, "mar.pth", "kl", out), "no whole kl file", "the format that fits is mar")
    refused(bring(folder, "kl16.ckpt", "kl", out, *recipe), "--recipe is for --format mar and himar")
    refused(bring(folder, "kl16.ckpt", "kl", out, "--scales", "1,2"), "have no scales")
    refused(bring(folder, "kl16.ckpt", "kl", out, "--tokenizer", tokenizer), "is a tokenizer itself")
    refused(bring(folder, "mar.pth", "mar", out, *recipe, "--base", folder / "mar.pth"), "no use for --base")
    refused(bring(folder, "mar.pth", "mar", out, *recipe, "--tokenizer", out), "no such checkpoint")
    assert not out.exists()


def test_another_tokenizer_is_refused(folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "mine.toml"
    recipe = (folder / "mar.toml").read_text()
    other.write_text(recipe + "[tokenizer]\nz_channels = 8\n")
    result = bring(folder, "mar.pth", "mar", out, "--recipe", other, "--tokenizer", tokenizer)
    refused(result, "don't fit their recipe")  # the model itself is of 16 channels
    other.write_text(recipe.replace("size = 64", "size = 32") + "[tokenizer]\nmultipliers = [1, 2, 2, 4]\n")
    result = bring(folder, "mar.pth", "mar", out, "--recipe", other, "--tokenizer", tokenizer)
    refused(result, "16 latent channels and stride 8", "16 latent channels and stride 16")
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    for path in tokenizer.iterdir():
        text = path.read_bytes()
        if path.name == "recipe.toml":
            text = text.replace(b"latent_scale = 0.2325", b"latent_scale = 0.0")
        (unknown / path.name).write_bytes(text)
    result = bring(folder, "mar.pth", "mar", out, "--recipe", folder / "mar.toml", "--tokenizer", unknown)
    refused(result, "latent scale", "not known yet")
    assert not out.exists()


def test_averaged_weights_that_lack_a_tensor_are_refused(folder: Path, tmp_path: Path) -> None:
    content = torch.load(folder / "mar.pth", weights_only=False)
    del content["model_ema"]["fake_latent"]
    torch.save(content, tmp_path / "cut.pth")
    result = bring(tmp_path, "cut.pth", "mar", tmp_path / "out", "--recipe", folder / "mar.toml")
    refused(result, "averaged weights do not fit", "null_embed")
    assert not (tmp_path / "out").exists()

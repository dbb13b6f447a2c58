"""`hmar checkpoint import`: what does not belong together is refused, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import golden
import pytest
import torch
from torch import Tensor
from toy_runs import hmar

from hmar_cli.commands.checkpoint import FormatName
from hmar_cli.files import file_sha256
from hmar_cli.imports import FORMATS
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Recipe

SaveRandom = Callable[[Path, Recipe, tuple[str, ...]], None]
NAMES = {"var": "var-a", "next-scale": "hmar-nsp-a", "masked": "hmar-mp-a", "merged": "hmar-full-a"}


def test_the_flag_offers_every_format() -> None:
    assert set(get_args(FormatName)) == set(FORMATS)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published file of each kind, by name, and the scales that they share."""
    folder = tmp_path_factory.mktemp("published")
    for name, fixture in NAMES.items():
        about, tensors = golden.load_fixture(golden.folder() / f"{fixture}.json")
        state: dict[str, Tensor] = golden.part(tensors, "state.")
        own = {k: v for k, v in state.items() if not k.startswith("vae.")}
        torch.save(own, folder / f"{name}.pth")
        if vae := golden.part(state, "vae."):
            torch.save(vae, folder / "vae.pth")
            (folder / "scales").write_text(",".join(map(str, about["config"]["vae"]["v_patch_nums"])))
    return folder


def bring(published: Path, out: Path, name: str, format: str, *more: object, scales: str = "") -> Any:
    arguments = ("checkpoint", "import", published / f"{name}.pth", "--format", format, "--out", out)
    return hmar(*arguments, "--scales", scales or (published / "scales").read_text(), *more)


def refused(result: Any, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def tokenizer(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "tokenizer"
    result = bring(published, out, "vae", "msvq")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def masked(published: Path) -> dict[str, Tensor]:
    """A masked model as the next-scale file's: its last block, its head and a mask embedding are new."""
    state: dict[str, Tensor] = torch.load(published / "next-scale.pth")
    embedding = torch.load(published / "masked.pth")["mask_embed.weight"]
    state = {
        k: v + 1 if k.startswith(("blocks.1.", "head")) and v.is_floating_point() else v
        for k, v in state.items()
    }
    state["mask_embed.weight"] = embedding[..., : state["pos_start"].shape[-1]]
    torch.save(state, published / "new.pth")
    return state


def test_a_masked_file_is_merged_with_its_base(
    published: Path, masked: dict[str, Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    base = published / "next-scale.pth"
    out = tmp_path / "merged"
    flags = ("--base", base, "--masked-layers", 1, "--tokenizer", tokenizer, "--json")
    result = bring(published, out, "new", "hmar", *flags)
    assert result.exit_code == 0, result.output
    account = json.loads(result.stdout)
    keys = [*torch.load(base), *masked]
    assert account["imported"] + len(account["shared"]) + len(account["derived"]) == len(keys)
    assert "class_embed.weight" in account["shared"] and "blocks.0.attention.qkv.weight" in account["shared"]
    assert "non-commercial" in result.stderr
    about = json.loads(hmar("checkpoint", "inspect", out, "--json").stdout)
    assert about["masked_branch"] and about["tokenizer"] == "carried"
    shown = "".join(c for c in hmar("checkpoint", "inspect", out).stdout if c not in " │\n")
    assert about["tokenizer_hash"] in shown
    assert about["source"]["sha256"] == file_sha256(published / "new.pth")
    assert about["source"]["base_sha256"] == file_sha256(base)
    assert about["size"] == json.loads(hmar("checkpoint", "inspect", tokenizer, "--json").stdout)["size"]
    drawn = hmar(
        "sample", "--checkpoint", out, "--count", 1, "--schedule", "1,2,1,1", "--out", tmp_path / "s"
    )
    assert drawn.exit_code == 0, drawn.output


def test_files_that_do_not_belong_together_are_refused(
    published: Path, masked: dict[str, Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    out, base = tmp_path / "out", ("--base", published / "next-scale.pth")
    refused(bring(published, out, "new", "hmar"), "next-scale blocks", "--base")
    refused(bring(published, out, "new", "var"), "masked branch of HMAR", "--format hmar")
    refused(bring(published, out, "merged", "var"), "masked branch of HMAR", "--format hmar")
    refused(bring(published, out, "merged", "hmar", *base), "no use for --base")
    refused(bring(published, out, "new", "hmar", *base), "--masked-layers 8: the model has 2 blocks")
    refused(bring(published, out, "masked", "hmar", *base), "3 blocks cannot be merged", "model of 2")
    merged = ("--base", published / "merged.pth", "--masked-layers", 1)
    refused(bring(published, out, "new", "hmar", *merged), "cannot be merged with a merged model")
    refused(
        bring(published, out, "var", "msvq"),
        "keys don't belong to the published msvq format",
        "is var or hmar",
    )
    refused(
        bring(published, out, "vae", "var"),
        "keys don't belong to the published transformer format",
        "is msvq",
    )
    torch.save({"fc.weight": torch.ones(2, 3), "mask_token": torch.ones(3)}, published / "foreign.pth")
    refused(bring(published, out, "foreign", "var"), "2 of 2 keys don't belong", "no published format fits")
    other = bring(published, tmp_path / "other", "vae", "msvq", scales="1,2,4")
    assert other.exit_code == 0, other.output
    mixed = bring(published, out, "var", "var", "--tokenizer", tmp_path / "other")
    refused(mixed, "needs a tokenizer with scales [1, 2, 3, 4]", "has scales [1, 2, 4]")
    refused(bring(published, out, "var", "var", "--tokenizer", tmp_path / "none"), "no such checkpoint")
    assert not out.exists()


@pytest.mark.parametrize(
    ("scales", "message"),
    [("1,x", "invalid literal"), ("4,2", "scales that grow"), ("0,1", "at least 1"), ("1,2,4", "pos_embed")],
)
def test_wrong_scales_are_refused(published: Path, tmp_path: Path, scales: str, message: str) -> None:
    refused(bring(published, tmp_path / "out", "var", "var", scales=scales), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "format", "key"), [("var", "var", "class_emb.weight"), ("vae", "msvq", "encoder.conv_in.weight")]
)
def test_a_file_without_a_key_is_refused(
    published: Path, tmp_path: Path, name: str, format: str, key: str
) -> None:
    state = torch.load(published / f"{name}.pth")
    del state[key]
    torch.save(state, published / "cut.pth")
    refused(bring(published, tmp_path / "out", "cut", format), "it has no ")
    assert not (tmp_path / "out").exists()


def test_names_that_look_like_markup_are_shown_as_they_are(save_random: SaveRandom, tmp_path: Path) -> None:
    small = ("model.depth=1", "model.width=32", "model.heads=2", "model.num_classes=2")
    save_random(tmp_path / "var", load_recipe("var-tiny", small), ("[red]x[/red]", "[/y]"))
    shown = hmar("checkpoint", "inspect", tmp_path / "var")
    assert shown.exit_code == 0 and "[red]x[/red], [/y]" in shown.stdout, shown.output

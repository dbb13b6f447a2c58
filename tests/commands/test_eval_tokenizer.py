"""`hmar eval tokenizer`, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.builders import build_image_network, build_tokenizer
from hmar_cli.checkpoints.store import save_checkpoint
from hmar_cli.recipe import load_recipe
from hmar_cli.tokenizers.blocks import hash_weights
from hmar_cli.tokenizers.losses import VGG_SLICES

SHAPES = "builtin:shapes?count=12&seed=3"
BODY = "channels = 8\nmultipliers = [1, 2]\nres_blocks = 1\nz_channels = 4\n"
RECIPES = {
    "msvq": f"[data]\nsize = 16\n[tokenizer]\n{BODY}vocab_size = 16\nscales = [1, 2, 4, 8]\n"
    '[objective]\nkind = "msvq"\n',
    "kl": f'[data]\nsize = 16\n[tokenizer]\nkind = "kl"\n{BODY}[objective]\nkind = "kl"\n',
    "judge": '[data]\nsize = 16\n[model]\nkind = "classifier"\nchannels = 8\nmultipliers = [1]\nres_blocks = 1\n'
    'num_classes = 8\n[objective]\nkind = "classifier"\n',
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random tokenizers and a random classifier, and a folder with photographs of two sizes."""
    folder = tmp_path_factory.mktemp("made")
    for name, text in RECIPES.items():
        (folder / f"{name}.toml").write_text(text)
        recipe = load_recipe(str(folder / f"{name}.toml"))
        torch.manual_seed(0)
        network: Any = build_image_network(recipe) if recipe.model else build_tokenizer(recipe.tokenizer)
        digest = hash_weights(network.state_dict(), b"classifier") if recipe.model else network.fingerprint()
        save_checkpoint(
            folder / name,
            recipe=recipe,
            weights={"model": network.state_dict()},
            class_names=tuple("abcdefgh") if recipe.model else (),
            step=7,
            tokenizer=None,
            tokenizer_hash=digest,
        )
    (folder / "photos").mkdir()
    for i, size in enumerate([(33, 24), (24, 33), (33, 24)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    return folder


def hmar(*arguments: object) -> Any:
    given = ["eval", "tokenizer", *map(str, arguments), "--device", "cpu"]
    return CliRunner().invoke(app, given, prog_name="hmar")


def found(*arguments: object) -> dict[str, Any]:
    result = hmar(*arguments, "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_the_report_says_what_was_measured_and_how(made: Path, tmp_path: Path) -> None:
    report = found(made / "msvq", SHAPES, "--extractor", made / "judge", "--out", tmp_path / "report.json")
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert set(report["metrics"]) == {"psnr", "ssim", "l1", "rfid", "usage"}
    assert report["metrics"]["rfid"]["name"] == "rFID[judge]-12"
    assert report["settings"]["images"]["sizes"] == {"16x16": 12} and report["settings"]["crop"] == "adm"
    assert len(report["settings"]["extractor"]["fingerprint"]) == len(report["subject"]["fingerprint"]) == 64
    assert report["made_with"]["images_per_second"] > 0 and report["made_with"]["processes"] == 1
    assert report["subject"]["step"] == 7 and report["subject"]["images"] == SHAPES
    assert [row["grid"] for row in report["about"]["scales"]] == [[1, 1], [2, 2], [4, 4], [8, 8]]
    assert [row["tokens"] for row in report["about"]["scales"]] == [12, 48, 192, 768]
    with Image.open(tmp_path / "report.png") as image:
        assert image.size == (12 * 66 - 2, 2 * 66 - 2)  # 12 pairs, enlarged four times, with gaps of 2


def test_images_of_any_shape(made: Path, tmp_path: Path) -> None:
    report = found(made / "msvq", made / "photos", "--native", "--grid", tmp_path / "grid.png")
    assert report["settings"]["images"]["sizes"] == {"24x32": 1, "32x24": 2}
    assert report["settings"]["crop"] == "none" and report["settings"]["extractor"] is None
    assert [row["tokens"] for row in report["about"]["scales"]] == [3 * n for n in (4, 12, 48, 192)]
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (3 * 66 - 2, 2 * 66 - 2)  # twice as large, on squares
    one = found(made / "msvq", next((made / "photos").iterdir()), "--native")
    assert one["settings"]["images"]["count"] == 1 and one["settings"]["images"]["sizes"].keys() <= {
        "24x32",
        "32x24",
    }
    wide = found(made / "kl", made / "photos", "--size", "32x16", "--crop", "var", "--count", 2)
    assert wide["settings"]["images"]["sizes"] == {"32x16": 2}
    assert set(wide["metrics"]) == {"psnr", "ssim", "l1", "latent_std", "posterior_std"}
    assert wide["about"]["scales"] == []


def test_a_table_for_people(made: Path) -> None:
    result = hmar(made / "msvq", SHAPES, "--count", 3)
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == f"msvq, 3 images of {SHAPES}, 16x16"
    assert [line.split()[0] for line in lines[1:]] == ["PSNR", "SSIM", "L1", "code", "scale", *"1234"]
    assert lines[1].endswith(" dB") and lines[4].endswith("%")


def test_two_tokenizers_compare_only_on_the_same_images(made: Path, tmp_path: Path) -> None:
    for name, count in (("msvq", 4), ("kl", 4), ("few", 3)):
        found(made / name.replace("few", "kl"), SHAPES, "--count", count, "--out", tmp_path / f"{name}.json")

    def compare(*names: str) -> Any:
        paths = [str(tmp_path / f"{name}.json") for name in names]
        return CliRunner().invoke(app, ["eval", "compare", *paths, "--metrics", "psnr,ssim", "--json"])

    rows = json.loads(compare("msvq", "kl").stdout)["rows"]
    assert [row["metrics"]["psnr"]["name"] for row in rows] == ["PSNR", "PSNR"]
    refused(compare("msvq", "few"), "images.count is 4 and 3")
    judged = ("--extractor", made / "judge", "--out", tmp_path / "judged.json")
    found(made / "kl", SHAPES, "--count", 4, *judged)
    assert compare("msvq", "judged").exit_code == 0  # PSNR and SSIM don't depend on the extractor


def test_several_processes_find_what_one_finds(made: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "hmar_cli",
        "eval",
        "tokenizer",
        made / "msvq",
        SHAPES,
        "--device",
        "cpu",
    ]
    flags = ["--extractor", made / "judge", "--batch-size", "2", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [*map(str, command), *map(str, flags), "--launch", "2"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    shared = json.loads(run.stdout)
    alone = found(made / "msvq", SHAPES, "--extractor", made / "judge", "--batch-size", 2)
    assert shared["made_with"]["processes"] == 2
    assert shared["settings"] == alone["settings"] and shared["about"] == alone["about"]
    for name, number in alone["metrics"].items():
        assert shared["metrics"][name]["value"] == pytest.approx(number["value"], rel=1e-6), name


def test_lpips_from_a_file(made: Path, tmp_path: Path) -> None:
    state = {
        f"lin{i}.model.1.weight": torch.ones(1, layers[-1][2], 1, 1) for i, layers in enumerate(VGG_SLICES)
    }
    for i, layers in enumerate(VGG_SLICES, start=1):
        for place, c_in, c_out in layers:
            state[f"net.slice{i}.{place}.weight"] = torch.full((c_out, c_in, 3, 3), 0.1 / c_in)
            state[f"net.slice{i}.{place}.bias"] = torch.zeros(c_out)
    save_file(state, tmp_path / "vgg.safetensors")
    report = found(made / "kl", SHAPES, "--count", 2, "--lpips-weights", tmp_path / "vgg.safetensors")
    assert report["metrics"]["lpips"]["name"] == "LPIPS[vgg]" and report["metrics"]["lpips"]["value"] > 0
    assert len(report["settings"]["lpips"]) == 64


def refused(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert message in next(line for line in lines if line.startswith("error: ")), result.stderr
    assert any(line.startswith("hint: ") for line in lines) and result.stdout == ""


def test_mistakes_are_one_line_and_a_hint(made: Path, tmp_path: Path) -> None:
    tokenizer, photos = made / "msvq", made / "photos"
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("no such checkpoint", (tmp_path / "nowhere", SHAPES)),
        ("no such source", (tokenizer, tmp_path / "nowhere")),
        ("without its tokenizer", (made / "judge", SHAPES)),
        ("--native scales no image", (tokenizer, photos, "--native", "--size", 16)),
        ("--size 16y: expected a side", (tokenizer, photos, "--size", "16y")),
        ("--size 0: expected a side", (tokenizer, photos, "--size", "0")),
        ("--size 15x16: a token of this tokenizer is 2 pixels", (tokenizer, photos, "--size", "15x16")),
        ("do not suit this tokenizer: expected scales that grow", (tokenizer, photos, "--size", 8)),
        ("no extractor 'what'", (tokenizer, photos, "--extractor", "what")),
        ("no file of LPIPS weights", (tokenizer, photos, "--lpips-weights", tmp_path / "none.pt")),
        ("an rFID needs 2", (tokenizer, photos, "--count", 1, "--extractor", made / "judge")),
        ("--preset tokenizer fixes --count", (tokenizer, photos, "--preset", "tokenizer", "--count", 3)),
        ("has 3 images, and --preset tokenizer is of 50000", (tokenizer, photos, "--preset", "tokenizer")),
        ("r.png: the report is JSON", (tokenizer, photos, "--out", tmp_path / "r.png")),
        (f"{tmp_path} is a folder", (tokenizer, photos, "--grid", tmp_path)),
    ]
    for message, arguments in cases:
        refused(hmar(*arguments), message)


def test_images_that_cannot_be_read_are_told_and_left_out(made: Path, tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    result = hmar(made / "kl", tmp_path, "--extractor", made / "judge", "--json")
    report = json.loads(result.stdout)
    assert report["settings"]["images"]["count"] == 2 and report["subject"]["unreadable"] == 1
    assert "warning: left out 1 images" in result.stderr and "image 1: " in result.stderr
    assert "warning: an rFID of 2 images says little" in result.stderr

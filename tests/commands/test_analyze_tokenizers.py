"""`hmar analyze tokenizers`: sets of images and sizes, with the numbers of `hmar eval tokenizer`."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_runs import run_python
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.commands import eval_tokenizer
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Recipe

SHAPES = "builtin:shapes?count=5&seed=2"


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, save_random: Callable[[Path, Recipe, tuple[str, ...]], None]
) -> Path:
    """A folder with a random tokenizer of each kind, carried by models, and pictures of two sizes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    small = ("model.width=32", "model.heads=2", "model.num_classes=8")
    save_random(folder / "codes", load_recipe("var-tiny", [*small, "model.depth=1"]), ())
    changes = [*small, "model.encoder_depth=1", "model.decoder_depth=1", "tokenizer.channels=8"]
    save_random(folder / "latents", load_recipe("mar-tiny", changes), ())
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(70, 40), (40, 70), (64, 64)]):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    return folder


def hmar(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu", "--json"], prog_name="hmar")


def measured(*arguments: object) -> dict[str, Any]:
    result = hmar(*arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_rows_are_what_eval_tokenizer_says(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mean_colours.py").write_text(
        "def make(): return lambda pixels: pixels.float().mean(dim=(2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    both = (world / "codes", world / "latents")
    flags = ("--images", SHAPES, "--images", world / "photos", "--shown", 2, "--out", tmp_path)
    judge = ("--extractor", "module:mean_colours:make")
    found = measured("analyze", "tokenizers", *both, *flags, "--sizes", "32,48x32", *judge)
    seen = [(row["images"], row["pixels"], row["tokenizer"], row["count"]) for row in found["rows"]]
    assert seen == [
        (images, pixels, tokenizer, count)
        for images, count in ((SHAPES, 5), ("photos", 3))
        for pixels in ("32x32", "48x32")
        for tokenizer in ("codes", "latents")
    ]
    alone = measured("eval", "tokenizer", world / "latents", world / "photos", "--size", "48x32", *judge)
    metrics = {each["name"]: each["value"] for each in alone["metrics"].values()}
    row = found["rows"][-1]
    assert row["PSNR (dB)"] == pytest.approx(metrics.pop("PSNR"))
    assert len(metrics) >= 4 and any(name.startswith("rFID[") for name in metrics)
    assert {name: row[name] for name in metrics} == {
        name: pytest.approx(value) for name, value in metrics.items()
    }
    with (tmp_path / "tokenizers.csv").open() as file:
        assert [line["SSIM"] for line in csv.DictReader(file)] == [
            str(each["SSIM"]) for each in found["rows"]
        ]
    with Image.open(tmp_path / "tokenizers-grid.png") as grid:
        assert grid.height == (2 + 8) * (2 * 48 + 4)  # two sets of images, and a row for each row
    assert (tmp_path / "tokenizers.png").is_file()
    assert len(found["settings"]["reports"]) == 8


def test_images_at_their_own_sizes_and_at_that_of_the_training(world: Path, tmp_path: Path) -> None:
    flags = ("--images", world / "photos", "--out", tmp_path)
    (row,) = measured("analyze", "tokenizers", world / "codes", *flags, "--sizes", "native")["rows"]
    assert sorted(row["pixels"].split()) == ["40x68", "64x64", "68x40"]  # a token has 4 pixels a side
    assert not any(name.startswith("rFID") for name in row)
    (row,) = measured("analyze", "tokenizers", world / "codes", *flags)["rows"]
    assert row["pixels"] == "32x32"


def test_two_processes_measure_as_one_though_one_of_them_has_no_image(world: Path, tmp_path: Path) -> None:
    flags = ("analyze", "tokenizers", world / "latents", "--images", SHAPES)
    more = ("--out", tmp_path / "two", "--launch", "2", "--device", "cpu", "--json")
    done = run_python("-m", "hmar_cli", *flags, *more)
    assert done.returncode == 0, done.stderr
    (alone,), (shared,) = measured(*flags, "--out", tmp_path / "one")["rows"], json.loads(done.stdout)["rows"]
    assert shared == pytest.approx(alone)
    grids = [(tmp_path / each / "tokenizers-grid.png").read_bytes() for each in ("one", "two")]
    assert grids[0] == grids[1]


def test_sets_of_one_name_are_told_apart(world: Path, tmp_path: Path) -> None:
    sources = [tmp_path / each / "photos" for each in "ab"]
    for source, name in zip(sources, ("0.png", "1.png"), strict=True):
        source.mkdir(parents=True)
        (source / name).write_bytes((world / "photos" / name).read_bytes())
    flags = [each for source in sources for each in ("--images", source)]
    found = measured("analyze", "tokenizers", world / "codes", *flags, "--out", tmp_path / "out")
    assert [row["images"] for row in found["rows"]] == [*map(str, sources)]
    with Image.open(tmp_path / "out" / "tokenizers-grid.png") as grid:
        assert grid.height == 4 * (64 + 4)  # of each its images and what becomes of them


def test_all_sets_are_seen_to_be_there_before_one_is_measured(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[object] = []
    monkeypatch.setattr(eval_tokenizer, "measure", lambda *given: looked.append(given))
    none, file = tmp_path / "none", world / "photos" / "0.png"
    for flags, message in (
        (("--images", none), f"no such source: {none}"),
        (("--out", file), f"{file} is a file"),
    ):
        result = hmar("analyze", "tokenizers", world / "codes", "--images", SHAPES, *flags)
        assert result.exit_code == 2 and message in result.stderr and not looked, result.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sizes", "big"), "expected a side"),
        (("--sizes", "30"), "must divide both"),
        (("--images", "nowhere/"), "nowhere"),
        (("--extractor", "module:torch:nothing"), "nothing"),
    ],
)
def test_mistakes(world: Path, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    images = () if "--images" in flags else ("--images", SHAPES)
    result = hmar("analyze", "tokenizers", world / "codes", *images, *flags, "--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stdout == "" and message in result.stderr, result.output
    assert result.stderr.splitlines()[-1].startswith("hint: ") and not (tmp_path / "out").exists()


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    result = hmar("analyze", "tokenizers", tmp_path / "none", "--images", SHAPES)
    assert result.exit_code == 2 and "no such checkpoint" in result.stderr

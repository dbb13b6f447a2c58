"""`hmar analyze` on small random next-scale models, by the commands alone."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from toy_runs import hmar

from hmar_cli.builders import build_image_network
from hmar_cli.checkpoints.store import open_checkpoint, save_checkpoint
from hmar_cli.commands import analyze_next_scale
from hmar_cli.commands.sweeping import Entry
from hmar_cli.data.shapes import SHAPES
from hmar_cli.files import file_sha256
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import NextScale, NextScaleObjective, Recipe

SMALL = ("model.depth=2", "model.width=64", "model.heads=2", "model.num_classes=8")
SHIPPED = {"var": "var-tiny", "hmar": "hmar-tiny", "masked": "hmar-tiny-masked"}
DATA = "builtin:shapes?seed=3&count=10"


def refused(result: Any, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert [line.split(":")[0] for line in lines] == ["error", "hint"] and result.stdout == ""
    for word in words:
        assert word in " ".join(lines)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, save_random: Callable[[Path, Recipe, tuple[str, ...]], None]
) -> Path:
    """A folder with random models of one tokenizer, a cache by it, a MAR and a classifier."""
    folder = tmp_path_factory.mktemp("analyze")
    for name, shipped in SHIPPED.items():
        save_random(folder / name, load_recipe(shipped, SMALL), SHAPES)
    mar = ("model.encoder_depth=1", "model.decoder_depth=1", "model.width=16", "model.heads=2")
    recipe = load_recipe("mar-tiny", (*mar, "model.num_classes=8", "tokenizer.latent_scale=0.5"))
    save_random(folder / "mar", recipe, SHAPES)
    recipe = load_recipe("classifier-tiny", ("model.channels=8",))
    assert recipe.model is not None
    recipe = replace(recipe, model=replace(recipe.model, num_classes=8))
    save_checkpoint(
        folder / "classifier",
        recipe=recipe,
        weights={"model": build_image_network(recipe).state_dict()},
        class_names=SHAPES,
        step=1,
        tokenizer=None,
        tokenizer_hash="0" * 64,
    )
    tokenize = ("--tokenizer", folder / "tokenizers" / "var", "--recipe", "msvq-tiny", "--device", "cpu")
    result = hmar("tokenize", DATA, *tokenize, "--out", folder / "cache")
    assert result.exit_code == 0, result.output
    return folder


def analyze(out: Path, name: str, *arguments: object) -> tuple[Any, dict[str, Any]]:
    """Run an analysis; what it printed, and its file, once the file and the CSV are seen to agree."""
    result = hmar("analyze", name, *arguments, "--out", out)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    with (out / f"{name}.csv").open() as file:
        table = list(csv.DictReader(file))
    assert found["analysis"] == name and len(table) == len(found["rows"]) > 0
    for printed, row in zip(table, found["rows"], strict=True):
        kept = {key: value for key, value in printed.items() if value != ""}
        assert kept == {key: str(value) for key, value in row.items() if value is not None}
    with Image.open(out / f"{name}.png") as image:
        assert min(image.size) > 200 and len(image.convert("RGB").getcolors(1 << 20) or []) > 3
    return result, found


def test_sequence_lengths_are_the_papers(tmp_path: Path) -> None:
    result, found = analyze(tmp_path, "lengths", "--resolutions", "256,512")
    seventh = {row["pixels"]: row for row in found["rows"] if row["figure"] == "7"}
    assert {pixels: row["next_scale"] for pixels, row in seventh.items()} == {256: 680, 512: 2240, 1024: 9451}
    eighth = [row for row in found["rows"] if row["figure"] == "8" and row["pixels"] == 256]
    assert (eighth[0]["steps"], eighth[0]["var"], eighth[0]["hmar"]) == (10, 680, 680)
    assert (eighth[-1]["steps"], eighth[-1]["var"], eighth[-1]["hmar"]) == (16, 1496, 680)
    assert "9451" in result.stdout
    refused(
        hmar("analyze", "lengths", "--resolutions", "300", "--out", tmp_path), "no scales for '300'", "256"
    )


def test_scales_of_several_models(world: Path, tmp_path: Path) -> None:
    models = (world / "var", world / "masked")
    result, found = analyze(tmp_path, "scales", *models, "--data", DATA, "--batch-size", 4, "--device", "cpu")
    lines = [(row["model"], row["task"]) for row in found["rows"]]
    counts = {line: lines.count(line) for line in lines}
    assert counts == {("var", "next-scale"): 6, ("masked", "next-scale"): 6, ("masked", "masked"): 5}
    assert found["settings"]["held_out"]["count"] == 10
    about = found["settings"]["models"][1]
    assert about["weights_sha256"] == file_sha256(world / "masked" / "model.safetensors")
    assert about["tokenizer_hash"] == open_checkpoint(world / "masked").tokenizer_hash
    assert [each["task"] for each in found["summary"]["totals"]] == ["next-scale", "next-scale", "masked"]
    assert "masked, next-scale: cross-entropy" in result.stderr
    cached = hmar("analyze", "scales", world / "var", "--data", world / "cache", "--json", "--out", tmp_path)
    document = json.loads(cached.stdout)
    for ours, theirs in zip(document["rows"], found["rows"], strict=False):
        assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-4)
    assert document["files"] == [str(tmp_path / f"scales{end}") for end in (".png", ".csv", ".json")]


def test_attention_of_several_models(world: Path, tmp_path: Path) -> None:
    models = (world / "var", world / "hmar")
    result, found = analyze(tmp_path, "attention", *models, "--data", DATA, "--count", 3)
    assert len(found["rows"]) == 2 * 2 * (21 + 6) and len(found["summary"]["scale_pairs"]) == 21 + 6
    assert len(result.stdout.splitlines()) == 1 + 21 + 6  # the table has the means over heads
    _, own = analyze(tmp_path / "own", "attention", world / "hmar", "--count", 3, "--seed", 4)
    assert own["settings"]["images"]["hmar"]["seed"] == 4


def test_teacher_forcing(world: Path, tmp_path: Path) -> None:
    flags = ("--data", DATA, "--count", 6, "--extractor", world / "classifier", "--shown", 2, "--cfg", 1)
    _, found = analyze(tmp_path, "teacher-forcing", world / "var", world / "masked", *flags)
    assert [row["known_scales"] for row in found["rows"]] == [*range(7), *range(7)]
    assert all(row["FID[classifier-tiny]-6"] >= 0 and 0 <= row["class"] <= 1 for row in found["rows"])
    assert [row["accuracy"] is None for row in found["rows"]] == [*[False] * 6, True, *[False] * 6, True]
    assert found["settings"]["models"][0]["sample"]["cfg"] == 1
    assert len(found["settings"]["models"][1]["sample"]["schedule"]) == 6  # the recipe's, that refines
    assert found["settings"]["extractor"]["name"] == "classifier-tiny"
    with Image.open(tmp_path / "teacher-forcing-grid.png") as grid:
        assert grid.height == 15 * (64 + 4)


def test_half_masked(world: Path, tmp_path: Path) -> None:
    _, found = analyze(
        tmp_path, "half-masked", world / "var", world / "masked", "--data", DATA, "--share", 0.3
    )
    assert [(row["model"], row["task"]) for row in found["rows"]] == [
        ("tokenizer", "reconstruction"),
        ("var", "next-scale"),
        ("masked", "next-scale"),
        ("masked", "masked"),
        ("another image", "chance"),
    ]
    assert found["settings"]["share"] == 0.3 and found["settings"]["extractor"] is None
    assert (tmp_path / "half-masked-grid.png").is_file()
    refused(
        hmar("analyze", "half-masked", world / "hmar", "--data", DATA), "no masked branch", "finetune-masked"
    )


def test_codebook_of_a_cache_and_of_images(world: Path, tmp_path: Path) -> None:
    _, cached = analyze(tmp_path / "cache", "codebook", world / "cache")
    _, encoded = analyze(tmp_path / "model", "codebook", world / "var", "--data", DATA, "--batch-size", 3)
    assert cached["rows"] == encoded["rows"]
    assert [row["scale"] for row in cached["rows"]] == ["1", "2", "3", "4", "6", "8", "all"]
    assert [row["tokens"] for row in cached["rows"]] == [10, 40, 90, 160, 360, 640, 1300]
    refused(hmar("analyze", "codebook", world / "var"), "--data is missing", "no cache")
    refused(hmar("analyze", "codebook", world / "mar", "--data", DATA), "no codebook")


def test_weightings(tmp_path: Path) -> None:
    _, found = analyze(tmp_path, "weightings")
    assert len(found["rows"]) == 6 * 10
    _, found = analyze(tmp_path, "weightings", "--sides", "1,2,3x4")
    assert [row["side"] for row in found["rows"][:3]] == ["1", "2", "3x4"]
    refused(hmar("analyze", "weightings", "--sides", "3,2", "--out", tmp_path), "3,2")


def test_each_weighting_is_trained_and_measured(world: Path, tmp_path: Path) -> None:
    small = [
        f"--train-set={each}"
        for each in (*SMALL, "train.batch_size=4", "train.steps=2", "train.save_every=2")
    ]
    flags = ("--data", world / "cache", "--runs", tmp_path / "runs", "--only", "none,lognormal", *small)
    judge = ("--reference", DATA, "--extractor", world / "classifier", "--metrics", "fid", "--count", 4)
    command = ("weighting-quality", *flags, *judge, "--device", "cpu", "--set", "cfg=0.5")
    planned = hmar("analyze", *command, "--dry-run")
    assert [Path(run).name for run in json.loads(planned.stdout)["train"]] == ["none", "lognormal"]
    assert not (tmp_path / "runs").exists()
    _, found = analyze(tmp_path / "out", *command)  # type: ignore[arg-type]
    assert [row["model"] for row in found["rows"]] == ["none", "lognormal"]
    assert all(row["FID[classifier-tiny]-4"] > 0 for row in found["rows"])
    for name in ("none", "lognormal"):
        objective = open_checkpoint(tmp_path / "runs" / name).recipe.objective
        assert isinstance(objective, NextScaleObjective) and objective.weighting == name
    assert found["settings"]["trials"][0]["cfg"] == 0.5
    refused(hmar("analyze", *command, "--vary", "cfg=1"), "has no place for it")
    planned = json.loads(hmar("analyze", *command, "--dry-run").stdout)
    assert [Path(run).name for run in planned["finished"]] == ["none", "lognormal"]
    assert planned["train"] == []


def test_recipes_of_weightings_differ_in_nothing_else() -> None:
    recipes = analyze_next_scale.weighted("hmar-tiny", "", ["train.steps=7"])
    assert list(recipes) == ["none", "equal", "linear", "sqrt", "exp-decay", "lognormal"]
    for name, recipe in recipes.items():
        assert isinstance(recipe.objective, NextScaleObjective) and recipe.objective.weighting == name
        assert replace(recipe, objective=recipes["none"].objective) == recipes["none"]
        assert recipe.train.steps == 7 and isinstance(recipe.model, NextScale)
    assert Entry("none", Path("runs/none")).path.name == "none"


@pytest.mark.parametrize("name", ["scales", "attention", "teacher-forcing", "half-masked"])
def test_what_is_no_model_of_scales_is_refused(name: str, world: Path, tmp_path: Path) -> None:
    data = ("--data", DATA, "--out", tmp_path)
    refused(hmar("analyze", name, world / "mar", *data), "MAR or Hi-MAR", "VAR or HMAR")
    refused(hmar("analyze", name, world / "tokenizers" / "var", *data), "holds a tokenizer")
    refused(hmar("analyze", name, tmp_path / "nothing", *data), "nothing")
    refused(hmar("analyze", name, world / "masked", *data, "--device", "tpu"), "--device tpu: unknown")
    scenes = ("--data", "builtin:scenes?count=3", "--out", tmp_path)
    refused(hmar("analyze", name, world / "masked", *scenes), "knows no class")
    refused(
        hmar("analyze", name, world / "masked", "--data", tmp_path / "no-images", "--out", tmp_path),
        "no-images",
    )
    assert list(tmp_path.iterdir()) == []  # nothing is written on a mistake
    (file := tmp_path / "file").write_text("")
    refused(
        hmar("analyze", name, world / "mar", "--data", DATA, "--out", file), f"{file} is a file"
    )  # before the model is looked at


def test_other_mistakes_are_one_line_and_a_hint(world: Path, tmp_path: Path) -> None:
    cache = ("--data", world / "cache", "--out", tmp_path)
    refused(
        hmar("analyze", "teacher-forcing", world / "var", *cache), "holds no pictures", "source of images"
    )
    refused(hmar("analyze", "attention", world / "var", "--count", 0), "--count 0")
    refine = ("--data", DATA, "--schedule", "1,2,1,1,1,1")
    refused(hmar("analyze", "teacher-forcing", world / "var", *refine), "no masked branch")
    train = ("analyze", "weighting-quality", "--data", world / "cache", "--reference", DATA)
    refused(hmar(*train, "--only", "cubic"), "no weighting 'cubic'", "lognormal")
    refused(hmar(*train, "--recipe", "mar-tiny"), "weighs no scales")
    refused(hmar(*train, "--train-seeds", "one"), "--train-seeds one")

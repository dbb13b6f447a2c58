"""`hmar eval edits` on small random models of all four families, by the command alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_runs import hmar

from hmar_cli.builders import build_image_network
from hmar_cli.checkpoints.store import save_checkpoint
from hmar_cli.data.shapes import SHAPES
from hmar_cli.pictures.painter import ModelPainter
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Recipe

NEXT = ("model.depth=1", "model.width=64", "model.heads=2", "model.num_classes=8")
MASKED = (
    "model.encoder_depth=1",
    "model.decoder_depth=1",
    "model.width=16",
    "model.heads=2",
    "model.num_classes=8",
    "tokenizer.latent_scale=0.5",
)
FAST = ("sample.steps=2", "sample.head_steps=2")
FAST_PIVOTS = (*FAST, "sample.pivot_steps=2", "sample.pivot_head_steps=2")
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "var": ("var-tiny", NEXT),
    "hmar": ("hmar-tiny-masked", (*NEXT, "model.depth=2", "objective.layers=1")),
    "mar": ("mar-tiny", (*MASKED, *FAST)),
    "himar": ("himar-tiny", (*MASKED, *FAST_PIVOTS)),
    "text": ("himar-scenes-tiny", (*MASKED, *FAST_PIVOTS, "text.width=32")),
}
FILLS = ["model", "tokenizer", "smooth continuation", "mean colour", "another picture"]
SOURCE = "builtin:shapes?seed=3&count=40"


SaveRandom = Callable[[Path, Recipe, tuple[str, ...]], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, save_random: SaveRandom) -> Path:
    """A folder with a random checkpoint of each family, a text model and a classifier."""
    folder = tmp_path_factory.mktemp("edits")
    for name, (shipped, changes) in RECIPES.items():
        recipe = load_recipe(shipped, changes)
        save_random(folder / name, recipe, () if name == "text" else SHAPES)
    recipe = load_recipe("classifier-tiny", ("model.channels=8",))
    network = build_image_network(recipe)
    save_checkpoint(
        folder / "classifier",
        recipe=recipe,
        weights={"model": network.state_dict()},
        class_names=SHAPES,
        tokenizer=None,
        step=1,
        tokenizer_hash="",
    )
    return folder


def measure(world: Path, name: str, *flags: object, source: str = SOURCE) -> Any:
    models = ("--checkpoint", world / name, "--extractor", world / "classifier")
    return hmar("eval", "edits", source, *models, "--count", 5, "--device", "cpu", *flags)


def measured(world: Path, name: str, *flags: object, source: str = SOURCE) -> Any:
    """The JSON of a measurement that went well, without the seconds."""
    result = measure(world, name, "--json", *flags, source=source)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    for row in found["rows"]:
        assert row.pop("seconds") >= 0
    return found


def rows(found: Any, fill: str) -> Any:
    return [row for row in found["rows"] if row["fill"] == fill]


@pytest.mark.parametrize("name", ["var", "hmar", "mar", "himar"])
def test_every_family(world: Path, name: str) -> None:
    found = measured(world, name)
    assert [row["fill"] for row in found["rows"]] == FILLS * 3
    assert [row["mask"] for row in found["rows"]] == [
        m for m in ("centre", "half", "free-form") for _ in FILLS
    ]
    assert found["metric"] == "FID[classifier-tiny]-5" and found["count"] == 5 and found["labels"] == "given"
    assert found["region"]["centre"] == 0.25 and found["region"]["half"] == 0.5
    for row in found["rows"]:
        assert 0 < row["psnr"] < 60 and row["distance"] > 0 and row["frechet"] >= 0
        assert row["accuracy"] == row["right"] / 5
    assert found["erase"] and found["match_colours"] and found["strength"] == 1
    assert found["keep_scales"] == (1 if name in ("var", "hmar") else 0)


def test_models_are_measured_on_the_same_images_and_masks(world: Path) -> None:
    var, mar = (measured(world, name, "--batch-size", batch) for name, batch in (("var", 2), ("mar", 5)))
    for fill in FILLS[2:]:
        for ours, theirs in zip(rows(var, fill), rows(mar, fill), strict=True):
            assert ours["psnr"] == theirs["psnr"] and ours["right"] == theirs["right"]
            assert ours["distance"] == pytest.approx(theirs["distance"], rel=1e-3)
    assert rows(var, "model") != rows(mar, "model")


def test_the_seed_and_the_batch(world: Path) -> None:
    first, again, other = (
        rows(measured(world, "hmar", *flags), "model")
        for flags in (("--batch-size", 5), ("--batch-size", 2), ("--seed", 1))
    )
    assert [row["psnr"] for row in first] == [row["psnr"] for row in again]
    assert all(a["psnr"] != b["psnr"] for a, b in zip(first, other, strict=True))


def test_a_model_that_knows_the_answer(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown the region and drawing what it is shown, it is perfect; with it erased, it is the continuation."""
    monkeypatch.setattr(ModelPainter, "paint", lambda self, images, *rest: images.astype(np.float32))
    seeing = measured(world, "mar", "--no-erase")
    assert all(row["psnr"] == 60 and row["distance"] < 1e-4 for row in rows(seeing, "model"))
    assert all(row["seam"] == seeing["originals_seam"][row["mask"]] for row in rows(seeing, "model"))
    assert all(row["right"] == seeing["originals_right"] for row in rows(seeing, "model"))
    blind = measured(world, "mar")
    for ours, theirs in zip(rows(blind, "model"), rows(blind, "smooth continuation"), strict=True):
        assert ours["psnr"] == pytest.approx(theirs["psnr"], abs=1e-9)


def test_classes_and_texts_reach_the_model(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    paint = ModelPainter.paint

    def note(self: ModelPainter, images: Any, region: Any, variations: Any, step: int) -> Any:
        asked.append((list(variations), self.conditions.encode(variations, self.device), self.settings))
        return paint(self, images, region, variations, step)

    monkeypatch.setattr(ModelPainter, "paint", note)
    measured(world, "var")
    from hmar_cli.data.sources import open_source

    labels = [each.label for each in open_source(SOURCE, size=32).read(0, 5)]
    for numbers, condition, settings in asked:
        assert condition.tolist() == [labels[number] for number in numbers] and settings.cfg > 0
    assert sorted({number for numbers, *_ in asked for number in numbers}) == list(range(5))
    asked.clear()
    measured(world, "var", "--labels", "none")
    assert all(condition is None and settings.cfg == 0 for _, condition, settings in asked)
    asked.clear()
    scenes = "builtin:scenes?count=40"
    found = measured(world, "text", source=scenes)
    assert "originals_right" not in found and "accuracy" not in found["rows"][0]
    batch = asked[0][1]
    assert len({tuple(row) for row in batch.tolist()}) == 5  # another caption for each
    asked.clear()
    measured(world, "text", "--labels", "none", source=scenes)
    assert all(condition is None and settings.cfg == 1 for _, condition, settings in asked)


def test_a_table_and_a_grid(world: Path, tmp_path: Path) -> None:
    result = measure(world, "himar", "--grid", tmp_path / "grid.png", "--shown", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "FID[classifier-tiny]-5" in lines[0] and len(lines) == 1 + 3 * len(FILLS) + 3
    assert lines[1].startswith("centre     model ") and lines[-3].startswith(f"5 images of {SOURCE}")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width == (2 + len(FILLS)) * (128 + 6) - 6 and image.height > 6 * 128


def test_what_needs_no_extractor(world: Path) -> None:
    """PSNR and seams are those that stand beside the features."""
    flags = ("--checkpoint", world / "var", "--count", 5, "--device", "cpu")
    result = hmar("eval", "edits", SOURCE, *flags, "--json")
    assert result.exit_code == 0, result.output
    found, whole = json.loads(result.stdout), measured(world, "var")
    assert found["metric"] is None and found["extractor"] is None and "originals_right" not in found
    for ours, theirs in zip(found["rows"], whole["rows"], strict=True):
        assert not {"distance", "frechet", "accuracy"} & set(ours)
        assert {**theirs, **{key: ours[key] for key in ours if key != "seconds"}} == theirs
    lines = hmar("eval", "edits", SOURCE, *flags).stdout.splitlines()
    assert lines[0].split() == ["region", "filled", "by", "PSNR", "seam"]
    assert len(lines) == 1 + 3 * len(FILLS) + 2


def test_some_masks_alone(world: Path, tmp_path: Path) -> None:
    every = measured(world, "var")
    one = measured(world, "var", "--masks", "half", "--grid", tmp_path / "grid.png", "--shown", 1)
    assert one["rows"] == every["rows"][len(FILLS) : 2 * len(FILLS)]
    assert list(one["region"]) == list(one["originals_seam"]) == ["half"]
    with Image.open(tmp_path / "grid.png") as image:
        assert image.height < 2 * 128


def refused(result: Any, line: str) -> None:
    assert result.exit_code == 2 and result.stdout == "", result.output
    first, hint = result.stderr.splitlines()[-2:]
    assert first.startswith("error: ") and line in first
    assert hint.startswith("hint: ")


def test_what_cannot_be_measured(world: Path, tmp_path: Path) -> None:
    for number in range(2):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{number}.png")
    refused(measure(world, "var", source=str(tmp_path)), "has pictures without classes")
    refused(measure(world, "var", "--labels", "none", "--cfg", 2), "--cfg guides towards a class")
    refused(measure(world, "mar", "--keep-scales", 1), "has no scales to keep")
    refused(measure(world, "var", "--strength", 0), "--strength 0 would change nothing")
    refused(measure(world, "var", source="builtin:scenes"), "knows no class")
    refused(measure(world, "classifier"), "holds a classifier, not a model")
    refused(measure(world, "var", "--masks", "centre,left"), "no mask 'left'")
    refused(measure(world, "var", "--steps", 3), "has no --steps")
    no_judge = hmar("eval", "edits", SOURCE, "--checkpoint", world / "var", "--extractor", world / "mar")
    refused(no_judge, "not a classifier")

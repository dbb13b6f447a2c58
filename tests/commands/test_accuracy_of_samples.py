"""The classification accuracy score: a classifier that saw only samples is tested on real images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.checkpoints.store import open_checkpoint
from hmar_cli.data.sources import open_source
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Recipe

MODEL = ("tokenizer.channels=8", "model.depth=1", "model.width=32", "model.heads=1", "model.num_classes=8")
CLASSIFIER = ("model.channels=8", "train.steps=12", "train.batch_size=8", "train.log_every=4")


def hmar(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"], prog_name="hmar")
    assert result.exit_code == 0, result.output
    return result


def test_from_a_model_to_the_accuracy_of_a_classifier_of_its_samples(
    tmp_path: Path, save_random: Callable[[Path, Recipe, tuple[str, ...]], None]
) -> None:
    real = open_source("builtin:shapes?count=16&seed=5", size=32)
    save_random(tmp_path / "model", load_recipe("var-tiny", MODEL), real.class_names)
    drawing = ("--labels", "star,circle,heart", "--count", 24, "--top-k", 1)
    hmar("sample", "--checkpoint", tmp_path / "model", *drawing, "--out", tmp_path / "samples")
    names = [name for name in real.class_names if name in ("star", "circle", "heart")]

    settings = [part for each in CLASSIFIER for part in ("--set", each)]
    given = ("--data", tmp_path / "samples", "--out", tmp_path / "cas", *settings)
    hmar("train", "--recipe", "classifier-tiny", *given)
    checkpoint = open_checkpoint(tmp_path / "cas")
    assert list(checkpoint.class_names) == names  # in the order of the model's classes, not of --labels
    assert checkpoint.recipe.data.source == str(tmp_path / "samples")

    for name in names:  # real images of the three classes
        (tmp_path / "real" / name).mkdir(parents=True)
    kept = [each for each in real.read(0, 16) if real.class_names[each.label] in names]
    for each in kept:
        assert each.image is not None
        each.image.save(tmp_path / "real" / real.class_names[each.label] / f"{each.index}.png")
    result = hmar("eval", "samples", tmp_path / "real", "--extractor", tmp_path / "cas", "--json")
    found = json.loads(result.stdout)["metrics"]["accuracy"]
    assert found["name"] == "Accuracy[classifier-tiny]"
    right = found["value"] * len(kept)
    assert 0 <= right <= len(kept) and right == pytest.approx(round(right))


COLOURS = {"sky": (40, 90, 220), "grass": (40, 180, 60), "fire": (230, 70, 30)}


def shade(name: str, index: int) -> Image.Image:
    """Noise around a colour of a class, other noise for every index."""
    noise = np.random.default_rng(index).normal(0, 50, (16, 16, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


def test_a_classifier_of_good_samples_knows_real_images(tmp_path: Path) -> None:
    """Labels travel from the samples' record into the classifier, and are found by name in the real images."""
    drawn, folder = ["fire", "sky", "grass"], tmp_path / "samples"
    folder.mkdir()
    for i in range(48):  # image i is of the i-th class, modulo their number
        shade(drawn[i % 3], i).save(folder / f"{i:06d}.png")
    (folder / "sample.json").write_text(json.dumps({"labels": [9, 2, 5], "class_names": drawn, "count": 48}))
    settings = [part for each in CLASSIFIER for part in ("--set", each)]
    given = ("--data", folder, "--out", tmp_path / "cas", *settings, "--set", "data.size=16")
    hmar("train", "--recipe", "classifier-tiny", *given, "--set", "train.steps=60")
    assert open_checkpoint(tmp_path / "cas").class_names == ("sky", "grass", "fire")
    for name in COLOURS:
        (tmp_path / "real" / name).mkdir(parents=True)
        for i in range(100, 110):
            shade(name, i).save(tmp_path / "real" / name / f"{i}.png")
    found = json.loads(
        hmar("eval", "samples", tmp_path / "real", "--extractor", tmp_path / "cas", "--json").stdout
    )
    assert found["metrics"]["accuracy"]["value"] > 0.8  # chance is 1/3

"""From a classifier's recipe to a number: `hmar train`, then `hmar eval samples`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.builders import load_classifier
from hmar_cli.checkpoints.store import open_checkpoint, save_checkpoint
from hmar_cli.data.sources import open_source
from hmar_cli.recipe import load_recipe
from hmar_cli.tokenizers.blocks import hash_weights

RECIPE = """
name = "toy-classifier"
[data]
source = "builtin:shapes?count=32"
size = 8
[model]
kind = "classifier"
channels = 8
multipliers = [1, 2]
res_blocks = 1
[objective]
kind = "classifier"
[optim]
base_lr = 0.1
[train]
batch_size = 8
steps = 4
ema = 0.5
log_every = 1
"""
REFERENCE = "builtin:shapes?count=20&seed=1"


def hmar(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="hmar")


def refused(result: Any, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("hint: ") and result.stdout == ""
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "toy-classifier.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "classifier"
    result = hmar("train", "--recipe", recipe, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"next: hmar eval samples FOLDER --reference SOURCE --extractor {out}" in result.stderr
    return out


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Drawings as `hmar sample` would write them, with the classes that they show."""
    folder, source = tmp_path / "samples", open_source("builtin:shapes?count=12&seed=2", size=8)
    folder.mkdir()
    examples = list(source.read(0, 12))
    for example in examples:
        assert example.image is not None
        example.image.save(folder / f"{example.index:06d}.png")
    labels = [example.label for example in examples]
    names = [source.class_names[label] for label in labels]
    (folder / "sample.json").write_text(json.dumps({"labels": labels, "class_names": names, "count": 12}))
    return folder


def measure(run: Path, samples: Path, *more: object) -> Any:
    arguments = ("--reference", REFERENCE, "--extractor", run, "--device", "cpu", *more)
    return hmar("eval", "samples", samples, *arguments)


def test_a_classifier_is_a_checkpoint_of_its_own_kind(run: Path, recipe: Path) -> None:
    checkpoint = open_checkpoint(run)
    assert (checkpoint.kind, checkpoint.weights, checkpoint.tokenizer) == (
        "classifier",
        ("model", "ema"),
        None,
    )
    assert checkpoint.class_names == open_source(REFERENCE).class_names
    assert checkpoint.recipe.model is not None
    assert checkpoint.recipe.model.num_classes == len(checkpoint.class_names)
    assert checkpoint.tokenizer_hash == hash_weights(checkpoint.load("ema"), b"classifier")
    again = hmar(
        "train", "--recipe", recipe, "--out", run, "--resume", "--set", "train.steps=5", "--device", "cpu"
    )
    assert again.exit_code == 0, again.output
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 5 and 0 <= row["accuracy"] <= 1 and row["loss"] > 0
    about = json.loads(hmar("checkpoint", "inspect", run, "--json").stdout)
    assert about["kind"] == "classifier" and "scales" not in about


def test_the_number_and_every_setting_of_it(run: Path, samples: Path) -> None:
    result = measure(run, samples, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    checkpoint = open_checkpoint(run)
    assert found["metric"] == "FD[toy-classifier]-12" and found["distance"] > 0
    assert found["extractor"] == {
        "checkpoint": str(checkpoint.folder),
        "recipe": "toy-classifier",
        "weights": "ema",
        "fingerprint": checkpoint.tokenizer_hash,
        "features": 16,
        "size": 8,
        "crop": "adm",
    }
    for part, source, count in (("samples", str(samples), 12), ("reference", REFERENCE, 20)):
        about = found[part]
        assert (about["source"], about["count"], about["unreadable"]) == (source, count, 0)
        assert about["accuracy"] == about["right"] / count
    small = json.loads(measure(run, samples, "--json", "--batch-size", 3).stdout)
    assert small["distance"] == pytest.approx(found["distance"], rel=1e-4)
    assert small["samples"] == found["samples"] and small["batch_size"] == 3


def test_accuracy_is_that_of_the_classifier(run: Path, samples: Path) -> None:
    network, _ = load_classifier(run)
    source = open_source("builtin:shapes?count=12&seed=2", size=8)
    from hmar_cli.data.transforms import image_transform, to_tensor

    cut = image_transform(8, "adm", train=False)
    right = 0
    for example in source.read(0, 12):
        pixels = torch.from_numpy(cut(example.image, None).copy())[None]  # type: ignore[arg-type]
        right += network(to_tensor(pixels)).argmax().item() == example.label
    assert json.loads(measure(run, samples, "--json").stdout)["samples"]["right"] == right


def test_a_table_for_people(run: Path, samples: Path) -> None:
    lines = measure(run, samples).stdout.splitlines()
    assert lines[0].startswith("FD[toy-classifier]-12 ") and lines[0].endswith(f"20 images of {REFERENCE}")
    assert [line.split("  ")[0] for line in lines[1:]] == ["accuracy", "accuracy, reference"]
    assert "of 12 images" in lines[1] and "of 20 images" in lines[2]


def test_without_known_classes_there_is_a_distance_alone(run: Path, samples: Path) -> None:
    (samples / "sample.json").write_text(json.dumps({"labels": [0], "class_names": ["cat"]}))
    found = json.loads(measure(run, samples, "--json", "--count", 5).stdout)
    assert found["metric"] == "FD[toy-classifier]-5"
    assert "accuracy" not in found["samples"] and "accuracy" in found["reference"]
    (samples / "sample.json").unlink()  # any folder of images, the same ones
    plain = json.loads(measure(run, samples, "--json", "--count", 5).stdout)
    assert plain["distance"] == found["distance"]
    assert len(measure(run, samples).stdout.splitlines()) == 2


def test_equal_sets_have_no_distance(run: Path, samples: Path) -> None:
    same = ("--reference", samples, "--extractor", run, "--device", "cpu", "--json")
    (samples / "sample.json").unlink()
    assert json.loads(hmar("eval", "samples", samples, *same).stdout)["distance"] == pytest.approx(
        0, abs=1e-9
    )


def test_images_that_cannot_be_read_are_told_and_left_out(run: Path, samples: Path) -> None:
    (samples / "000003.png").write_bytes(b"no image")
    result = measure(run, samples, "--json")
    found = json.loads(result.stdout)
    assert found["metric"] == "FD[toy-classifier]-11" and found["samples"]["unreadable"] == 1
    assert "warning: left out 1 images" in result.stderr and "image 3: " in result.stderr


def test_mistakes_are_one_line_and_a_hint(run: Path, recipe: Path, samples: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(measure(run, tmp_path / "empty"), "no images")
    refused(measure(run, tmp_path / "nowhere"), "no folder")
    refused(measure(run, samples, "--count", 1), "has 1 images that can be read")
    refused(measure(run, samples, "--reference", "builtin:shape"), "no built-in data")
    refused(measure(tmp_path / "no-run", samples), "no such checkpoint")
    other = load_recipe("msvq-tiny")
    save_checkpoint(
        tmp_path / "msvq",
        recipe=other,
        weights={"model": {"x": torch.zeros(1)}},
        class_names=(),
        step=0,
        tokenizer=None,
        tokenizer_hash="",
    )
    refused(measure(tmp_path / "msvq", samples), "holds a msvq, not a classifier")
    refused(hmar("sample", "--checkpoint", run), "holds a classifier, not a model")
    refused(hmar("tokenize", REFERENCE, "--tokenizer", run, "--out", tmp_path / "cache"))
    train = ("train", "--recipe", recipe, "--out", tmp_path / "out", "--device", "cpu")
    refused(hmar(*train, "--tokenizer", run), "this recipe trains a classifier")
    refused(hmar(*train, "--init", tmp_path / "msvq"), "holds a msvq, and the recipe trains a classifier")
    refused(hmar(*train, "--data", "builtin:scenes?count=16"), "no labels of several classes")

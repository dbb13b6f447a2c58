"""From a classifier's recipe to numbers: `hmar train`, then `hmar eval samples` of folders, arrays, checkpoints."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_runs import MSVQ, hmar

from hmar_cli.builders import load_classifier
from hmar_cli.checkpoints.store import open_checkpoint, save_checkpoint
from hmar_cli.commands import evaluating
from hmar_cli.commands.subjects import passing_folder
from hmar_cli.data.shapes import SHAPES
from hmar_cli.data.sources import open_source
from hmar_cli.errors import UserError
from hmar_cli.evaluation import presets, references
from hmar_cli.evaluation.presets import PRESETS, Preset
from hmar_cli.evaluation.reports import Report
from hmar_cli.files import fetch, file_sha256
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Recipe
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
EVERY = "fid,is,kid,precision,recall"
TOKENIZER = f"""
[data]
size = 8
{MSVQ}
[model]
depth = 1
width = 32
heads = 2
num_classes = 8
[objective]
kind = "next-scale"
[sample]
batch_size = 5
"""
FEATURES = """
def mean_colours():
    return lambda pixels: pixels.float().mean(dim=(2, 3))
"""
ROOT = Path(__file__).parents[2]
SaveRandom = Callable[[Path, Recipe, tuple[str, ...]], None]


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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_random: SaveRandom) -> Path:
    """A random VAR of 8 px that knows the classes of the shapes."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "toy-var.toml").write_text(TOKENIZER)
    save_random(folder / "var", load_recipe(str(folder / "toy-var.toml")), SHAPES)
    return folder / "var"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An extractor that is a function of a module, as users can give one."""
    (tmp_path / "toy_features.py").write_text(FEATURES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "module:toy_features:mean_colours"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hmar"


def measure(run: Path, samples: object, *more: object) -> Any:
    arguments = ("--reference", REFERENCE, "--extractor", run, "--device", "cpu", *more)
    return hmar("eval", "samples", samples, *arguments)


def measured(run: Path, samples: object, *more: object) -> Any:
    """The report of a measurement that went well."""
    result = measure(run, samples, "--json", *more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def values(report: Any) -> dict[str, float]:
    return {metric: number["value"] for metric, number in report["metrics"].items()}


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


def test_the_numbers_and_every_setting_of_them(run: Path, samples: Path) -> None:
    found = measured(run, samples, "--metrics", EVERY)
    checkpoint = open_checkpoint(run)
    names = {metric: number["name"] for metric, number in found["metrics"].items()}
    assert names == {
        "fid": "FID[toy-classifier]-12",
        "is": "IS[toy-classifier]-12",
        "kid": "KID[toy-classifier]-12",
        "precision": "Precision[toy-classifier]-12",
        "recall": "Recall[toy-classifier]-12",
        "accuracy": "Accuracy[toy-classifier]",
    }
    assert found["metrics"]["fid"]["value"] > 0 and found["metrics"]["is"]["spread"] > 0
    assert found["metrics"]["kid"]["subset_size"] == 12  # and not 1000, which there are not
    reference = found["about"]["reference"]
    assert found["settings"] == {
        "extractor": {"name": "toy-classifier", "fingerprint": checkpoint.tokenizer_hash},
        "size": [8, 8],
        "crop": "adm",
        "count": 12,
        "reference": {"sha256": reference["sha256"], "count": 20},
        "protocol": {
            "seed": 2020,
            "is_splits": 10,
            "kid_subsets": 100,
            "kid_subset_size": 1000,
            "neighbours": 3,
        },
    }
    assert found["about"]["extractor"]["checkpoint"] == str(checkpoint.folder)
    assert (reference["source"], reference["count"], reference["crop"]) == (REFERENCE, 20, "adm")
    subject = found["subject"]
    assert (subject["kind"], subject["source"], subject["count"]) == ("samples", str(samples), 12)
    assert subject["sampling"]["labels"] == json.loads((samples / "sample.json").read_text())["labels"]
    made = found["made_with"]
    assert made["versions"]["torch"] == torch.__version__ and made["processes"] == 1
    small = measured(run, samples, "--metrics", EVERY, "--batch-size", 3)
    assert values(small) == pytest.approx(values(found), rel=1e-4)
    assert (small["subject"], small["settings"]) == (subject, found["settings"])


def test_accuracy_is_that_of_the_classifier(run: Path, samples: Path) -> None:
    network, _ = load_classifier(run)
    source = open_source("builtin:shapes?count=12&seed=2", size=8)
    from hmar_cli.data.transforms import image_transform, to_tensor

    cut = image_transform(8, "adm", train=False)
    right = 0
    for example in source.read(0, 12):
        pixels = torch.from_numpy(cut(example.image).copy())[None]  # type: ignore[arg-type]
        right += network(to_tensor(pixels)).argmax().item() == example.label
    for found in (
        measured(run, samples),
        measured(run, "builtin:shapes?count=12&seed=2"),
    ):  # real images, too
        assert found["subject"]["right"] == right and values(found)["accuracy"] == right / 12


def test_a_classifier_alone_tells_its_accuracy(run: Path) -> None:
    result = hmar("eval", "samples", REFERENCE, "--extractor", run, "--device", "cpu", "--json")
    assert list(json.loads(result.stdout)["metrics"]) == ["accuracy"], result.output


def test_a_table_for_people(run: Path, samples: Path) -> None:
    lines = measure(run, samples, "--metrics", "fid,is").stdout.splitlines()
    assert lines[1].startswith("FID[toy-classifier]-12 ") and "lower is better" in lines[1]
    assert lines[2].startswith("IS[toy-classifier]-12 ") and " ± " in lines[2] and "the seed 2020" in lines[2]
    assert lines[3].startswith("Accuracy[toy-classifier] ") and "% " in lines[3]
    assert lines[4].startswith("  of the reference ") and "of 20 images" in lines[4]
    assert lines[5] == f"12 images of {samples}, 8 x 8"
    assert lines[6].startswith(f"reference: 20 images of {REFERENCE} (")


def test_without_known_classes_there_is_a_distance_alone(run: Path, samples: Path) -> None:
    (samples / "sample.json").write_text(json.dumps({"labels": [0], "class_names": ["cat"]}))
    found = measured(run, samples, "--count", 5)
    assert list(found["metrics"]) == ["fid"] and found["metrics"]["fid"]["name"] == "FID[toy-classifier]-5"
    assert "accuracy" not in found["subject"] and "accuracy" in found["about"]["reference"]
    (samples / "sample.json").unlink()  # any folder of images, the same ones
    assert values(measured(run, samples, "--count", 5)) == values(found)


def test_equal_sets_have_no_distance(run: Path, samples: Path) -> None:
    assert values(measured(run, samples, "--reference", samples))["fid"] == pytest.approx(0, abs=1e-9)


def test_images_that_cannot_be_read_are_told_and_left_out(run: Path, samples: Path) -> None:
    (samples / "000003.png").write_bytes(b"no image")
    result = measure(run, samples, "--json")
    found = json.loads(result.stdout)
    assert found["metrics"]["fid"]["name"] == "FID[toy-classifier]-11"
    assert found["subject"]["unreadable"] == 1 and found["settings"]["count"] == 11
    assert "warning: left out 1 images" in result.stderr and "image 3: " in result.stderr


def test_images_that_are_enlarged_are_warned_of(samples: Path, module: str, tmp_path: Path) -> None:
    (photos := tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 6)).save(photos / "low.png")
    Image.new("RGB", (8, 8)).save(photos / "large.png")
    result = hmar("eval", "samples", samples, "--reference", photos, "--extractor", module, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"warning: 1 images of {photos} are smaller than 8 x 8 and were enlarged" in result.stderr
    assert result.stderr.count("were enlarged") == 1  # the samples were not


def test_few_images_for_the_features_are_warned_of(run: Path, samples: Path) -> None:
    few = measure(run, samples).stderr  # 16 features; 12 images, and 20 of the reference
    assert f"warning: FID by 12 images of {samples} says little: their covariance has 16 rows" in few
    assert "FID by 20" not in few
    assert "says little" not in measure(run, samples, "--metrics", "precision,recall").stderr
    assert "says little" not in measure(run, "builtin:shapes?count=17").stderr


def test_few_images_for_the_inception_score_are_warned_of(run: Path, samples: Path) -> None:
    """Of the 12 drawings none of 10 parts has more than two; a part of one image scores 1, whatever it shows."""
    few = measure(run, samples, "--metrics", "is").stderr
    assert few.count("says little") == 1  # the 20 images of the reference have no score
    assert f"warning: IS by 12 images of {samples} says little: none of its 10 parts can score above" in few
    assert "says little" in measure(run, "builtin:shapes?count=99", "--metrics", "is").stderr
    assert "says little" not in measure(run, "builtin:shapes?count=100", "--metrics", "is").stderr


def test_statistics_stand_for_the_images_they_were_made_of(run: Path, samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "shapes.npz"
    made = hmar(
        "eval",
        "samples",
        REFERENCE,
        "--extractor",
        run,
        "--metrics",
        EVERY,
        "--make-stats",
        path,
        "--device",
        "cpu",
    )
    assert made.exit_code == 0 and "statistics of 20 images" in made.stderr, made.output
    direct, ours = (measured(run, samples, "--metrics", EVERY, *more) for more in ((), ("--reference", path)))
    assert values(ours) == pytest.approx(values(direct), rel=1e-9)
    assert ours["settings"] == direct["settings"]  # so that the two compare
    refused(measure(run, samples, "--reference", path, "--metrics", "sfid"), "mu_s and sigma_s")


def test_statistics_that_others_made_go_with_any_crop(
    run: Path, samples: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ("--extractor", run, "--metrics", "fid", "--make-stats", tmp_path / "ours.npz", "--device", "cpu")
    assert hmar("eval", "samples", REFERENCE, *made).exit_code == 0
    ours, path = np.load(tmp_path / "ours.npz"), tmp_path / "theirs.npz"
    np.savez(path, mu=ours["mu"], sigma=ours["sigma"])
    monkeypatch.setattr(references, "PUBLISHED", open_checkpoint(run).tokenizer_hash)
    flags = ("--reference", path, "--metrics", "fid", "--crop")
    for crop in ("adm", "var"):
        assert measured(run, samples, *flags, crop)["settings"]["crop"] == crop
    drawn = measured(run, model, "--count", 4, *flags, "var")
    assert drawn["settings"]["crop"] == "var" and drawn["about"]["reference"]["crop"] == "none"


def test_statistics_alone_are_no_table_without_a_number(module: str, tmp_path: Path) -> None:
    flags = ("--size", 8, "--extractor", module, "--make-stats", tmp_path / "s.npz", "--device", "cpu")
    made = hmar("eval", "samples", REFERENCE, *flags)
    assert made.exit_code == 0 and made.stdout.startswith(f"20 images of {REFERENCE}"), made.output


def test_arrays_of_adm_are_images_too(run: Path, samples: Path, tmp_path: Path) -> None:
    pixels = np.stack([np.asarray(Image.open(samples / f"{i:06d}.png")) for i in range(12)])
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    np.savez_compressed(tmp_path / "small.npz", arr_0=pixels)
    folder = measured(run, samples)
    for name in ("samples.npz", "small.npz"):
        found = measured(run, tmp_path / name)
        assert values(found)["fid"] == values(folder)["fid"]
        assert found["subject"]["sha256"] == folder["subject"]["sha256"]
    np.savez(tmp_path / "wrong.npz", arr_1=pixels)
    refused(measure(run, tmp_path / "wrong.npz"), "holds no array arr_0")
    refused(measure(run, f"{tmp_path / 'samples.npz'}?split=test"), "unknown option 'split'", "no options")


def test_the_size_and_the_crop_are_those_asked_for(run: Path, module: str, tmp_path: Path) -> None:
    source = open_source("builtin:shapes?count=6", size=(16, 24))
    (tmp_path / "wide").mkdir()
    for example in source.read(0, 6):
        example.image.save(tmp_path / "wide" / f"{example.index}.png")  # type: ignore[union-attr]
    flags = ("--extractor", module, "--reference", tmp_path / "wide")
    as_it_is = measured(run, tmp_path / "wide", *flags)
    assert as_it_is["settings"]["size"] == [16, 24]
    for crop in ("adm", "var"):
        cut = measured(run, tmp_path / "wide", *flags, "--size", 12, "--crop", crop)
        assert (cut["settings"]["size"], cut["settings"]["crop"]) == ([12, 12], crop)
        assert cut["subject"]["sha256"] != as_it_is["subject"]["sha256"]


def test_a_report_and_the_grid_of_what_was_measured(run: Path, samples: Path, tmp_path: Path) -> None:
    result = measure(run, samples, "--out", tmp_path / "report.json")
    assert result.exit_code == 0 and "the first 12 images in" in result.stderr
    assert json.loads((tmp_path / "report.json").read_text())["format"] == "hmar-eval"
    with Image.open(tmp_path / "report.png") as image:
        grid = np.asarray(image)
    assert grid.shape == (3 * 10 - 2, 4 * 10 - 2, 3)
    for place, number in ((0, 0), (5, 5), (11, 11)):
        row, column = divmod(place, 4)
        tile = grid[10 * row : 10 * row + 8, 10 * column : 10 * column + 8]
        assert (tile == np.asarray(Image.open(samples / f"{number:06d}.png"))).all()
    measure(run, samples, "--grid", tmp_path / "own.png")
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "report.png").read_bytes()
    refused(measure(run, samples, "--out", tmp_path / "report.png"), "the report is JSON")


def test_a_checkpoint_draws_what_is_measured(run: Path, model: Path, cache: Path, tmp_path: Path) -> None:
    flags = ("--count", 11, "--seed", 4, "--labels", "circle,star", "--cfg", 2)
    found = measured(run, model, *flags, "--metrics", EVERY)
    assert [path.suffix for path in (cache / "eval").iterdir()] == [".lock"]  # and no image
    drawn = hmar("sample", "--checkpoint", model, *flags, "--out", tmp_path / "drawn", "--device", "cpu")
    assert drawn.exit_code == 0, drawn.output
    folder = measured(run, tmp_path / "drawn", "--metrics", EVERY)
    assert values(folder) == values(found) and folder["settings"] == found["settings"]
    subject = found["subject"]
    assert (subject["kind"], subject["source"], subject["step"]) == ("checkpoint", str(model), 1)
    assert subject["sampling"] == folder["subject"]["sampling"]
    assert subject["sampling"]["weights_sha256"] == file_sha256(model / "model.safetensors")
    assert (subject["sampling"]["cfg"], subject["sampling"]["seed"]) == (2, 4)
    assert subject["sampling"]["class_names"] == ["circle", "star"]
    kept = measured(run, model, *flags, "--keep", tmp_path / "kept")
    assert (
        kept["subject"]["sha256"] == subject["sha256"] and kept["made_with"]["drawing"]["already_there"] == 0
    )
    again = measured(run, model, *flags, "--keep", tmp_path / "kept")
    assert again["made_with"]["drawing"]["already_there"] == 11
    fewer = measured(run, model, *flags, "--count", 6, "--keep", tmp_path / "kept")
    assert fewer["metrics"]["fid"]["name"] == "FID[toy-classifier]-6"


def test_an_interrupted_measurement_goes_on(
    run: Path, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "observe_together", stop)
        stopped = measure(run, model, "--count", 6)
    assert stopped.exit_code == 130 and "images drawn so far stay in" in stopped.stderr
    (folder,) = (path for path in (cache / "eval").iterdir() if path.is_dir())
    (folder / "000002.png").unlink()
    with (cache / "eval" / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(measure(run, model, "--count", 6), "another command is drawing these images", "--keep")
    found = measured(run, model, "--count", 6)
    assert found["made_with"]["drawing"]["already_there"] == 5
    assert [path.name for path in (cache / "eval").iterdir()] == [f"{folder.name}.lock"]


def test_a_folder_is_one_commands_at_a_time(tmp_path: Path) -> None:
    """Also where another one opened the lock before it was given back: both lock the same file."""
    folder = tmp_path / "folder"
    with passing_folder(folder, True):
        early = folder.with_suffix(".lock").open("w")
    with early:
        fcntl.flock(early, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="another command is drawing"), passing_folder(folder, True):
            pass
    with passing_folder(folder, True):
        folder.mkdir()
    assert not folder.exists()


def test_nothing_is_drawn_for_a_reference_that_is_not_there(
    run: Path, model: Path, cache: Path, tmp_path: Path
) -> None:
    refused(measure(run, model, "--count", 4, "--reference", tmp_path / "nowhere"), "no such source")
    refused(measure(run, model, "--count", 4, "--extractor", tmp_path / "nowhere"), "no extractor")
    refused(measure(run, model, "--count", 4, "--metrics", "fid,sfid"), "toy-classifier has not", "sfid out")
    made = ("eval", "samples", REFERENCE, "--extractor", run, "--device", "cpu", "--make-stats")
    assert hmar(*made, tmp_path / "var.npz", "--crop", "var").exit_code == 0
    other = ("--reference", tmp_path / "var.npz")
    refused(measure(run, model, "--count", 4, *other), "--crop var", "give --crop var")
    assert not (cache / "eval").exists()


def test_nothing_is_drawn_for_statistics_of_another_size(
    module: str, model: Path, cache: Path, tmp_path: Path
) -> None:
    path, look = tmp_path / "small.npz", ("--extractor", module, "--device", "cpu")
    made = hmar("eval", "samples", REFERENCE, "--size", 4, *look, "--make-stats", path)
    assert made.exit_code == 0, made.output
    result = hmar("eval", "samples", model, "--count", 4, "--reference", path, *look)
    refused(result, f"those of {path} 4 x 4", "--size")
    assert not (cache / "eval").exists()


def test_nothing_is_drawn_for_a_file_that_cannot_be_written(
    run: Path, model: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for flag, name in (("--out", "report.json"), ("--grid", "grid.png"), ("--make-stats", "stats.npz")):
        below = tmp_path / "file" / name
        refused(measure(run, model, "--count", 4, flag, below), str(below), f"{tmp_path / 'file'} is a file")
        (folder := tmp_path / name).mkdir()
        refused(measure(run, model, "--count", 4, flag, folder), f"{folder} is a folder")
    assert not (cache / "eval").exists()


def test_numbers_are_printed_before_anything_can_fail_to_be_written(
    run: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "report.json")

    monkeypatch.setattr(Report, "save", full)
    found = measure(run, samples, "--out", tmp_path / "report.json")
    assert found.exit_code == 2 and "error: No space left on device" in found.stderr
    assert "FID[toy-classifier]-12" in found.stdout


def test_fewer_images_than_asked_for_are_refused(run: Path, samples: Path) -> None:
    refused(measure(run, samples, "--count", 13), "--count 13: there are 12 images")


def test_two_processes_measure_what_one_does(run: Path, model: Path, tmp_path: Path) -> None:
    flags = ["--reference", REFERENCE, "--extractor", str(run), "--count", "11", "--metrics", EVERY]
    paths = os.pathsep.join([str(ROOT), str(ROOT / ".typing"), os.environ.get("PYTHONPATH", "")])
    reports = {}
    for processes in ("1", "2"):
        out = tmp_path / f"{processes}.json"
        command = [sys.executable, "-m", "hmar_cli", "eval", "samples", str(model), *flags]
        done = subprocess.run(
            [*command, "--batch-size", "3", "--out", str(out), "--device", "cpu", "--launch", processes],
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("FID[toy-classifier]-11") == 1  # one process reports
        reports[processes] = json.loads(out.read_text())
    one, two = reports["1"], reports["2"]
    assert (one["made_with"]["processes"], two["made_with"]["processes"]) == (1, 2)
    assert two["settings"] == one["settings"] and two["subject"] == one["subject"]
    assert values(two) == pytest.approx(values(one), rel=1e-9)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_a_dry_run_says_what_would_be_done(run: Path, model: Path, cache: Path) -> None:
    result = measure(run, model, "--count", 9, "--cfg", 2.5, "--metrics", "fid,is", "--dry-run")
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["images"].startswith("9 by seed 0") and "cfg 2.5" in lines["sampler"]
    assert lines["measure"].startswith("fid, is of 9 images") and lines["reference"] == REFERENCE
    result = measure(run, model, "--count", 9, "--cfg", 2.5, "--metrics", "fid,is", "--dry-run", "--json")
    about = json.loads(result.stdout)
    assert (about["draw"]["count"], about["draw"]["cfg"]) == (9, 2.5)
    assert about["measure"]["metrics"] == ["fid", "is"] and about["measure"]["reference"] == REFERENCE
    assert not (cache / "eval").exists()


def test_a_text_model_draws_captions_of_the_reference(
    run: Path, samples: Path, save_random: SaveRandom, tmp_path: Path
) -> None:
    small = (
        "model.encoder_depth=1",
        "model.decoder_depth=1",
        "model.width=16",
        "model.heads=2",
        "text.width=32",
    )
    recipe = load_recipe("himar-scenes-tiny", (*small, "tokenizer.latent_scale=0.5"))
    save_random(tmp_path / "text", recipe, ())
    source = "builtin:scenes?count=40"
    flags = (
        "--extractor",
        run,
        "--reference",
        source,
        "--count",
        20,
        "--dry-run",
        "--json",
        "--device",
        "cpu",
    )

    def prompts(*more: object) -> Any:
        result = hmar("eval", "samples", tmp_path / "text", *flags, *more)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["draw"]["prompts"]

    drawn = prompts()
    captions = [example.caption for example in open_source(source).read(0, 40)]
    assert len(drawn) == 20 and set(drawn) <= set(captions)
    assert all(drawn.count(each) <= captions.count(each) for each in drawn)  # no image twice
    assert prompts() == drawn != prompts("--seed", 1)
    assert prompts("--prompt", "a red circle") == ["a red circle"]
    many = prompts("--count", 33)
    assert many["count"] == 33 and set(many["first"]) <= set(captions)  # 30,000 would fill the screen
    too_many = hmar("eval", "samples", tmp_path / "text", *flags, "--count", 41)
    refused(too_many, "has 40 images with captions, and 41 prompts were asked for", "--prompt-file")
    without = hmar("eval", "samples", tmp_path / "text", *flags, "--reference", samples)
    refused(without, "draws what a text says", "--prompt-file")


def test_a_preset_fixes_everything(
    run: Path, samples: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / "published" / "VIRTUAL_toy.npz"
    made = ("--extractor", run, "--metrics", "fid,precision", "--make-stats", tmp_path / "stats.npz")
    assert hmar("eval", "samples", REFERENCE, *made, "--device", "cpu").exit_code == 0
    published.parent.mkdir()
    pixels = np.stack([np.asarray(each.image) for each in open_source(REFERENCE, size=8).read(0, 20)])
    np.savez(published, **np.load(tmp_path / "stats.npz"), arr_0=pixels)
    toy = Preset(
        about="",
        extractor=str(run),
        metrics=("fid", "precision"),
        count=10,
        size=8,
        reference="the toy file",
        address=published.as_uri(),
    )
    monkeypatch.setitem(PRESETS, "toy", toy)
    flags = ("--preset", "toy", "--device", "cpu", "--json")
    planned = json.loads(hmar("eval", "samples", samples, *flags, "--dry-run").stdout)
    assert planned["measure"]["reference"] == published.as_uri() and not (cache / "references").exists()
    first = hmar("eval", "samples", samples, *flags)
    assert first.exit_code == 0 and f"downloading {published.as_uri()}" in first.stderr, first.output
    found = json.loads(first.stdout)
    assert list(found["metrics"]) == ["fid", "precision", "accuracy"] and found["about"]["preset"] == "toy"
    assert (found["settings"]["count"], found["settings"]["size"], found["settings"]["crop"]) == (
        10,
        [8, 8],
        "adm",
    )
    kept = cache / "references" / published.name
    assert kept.read_bytes() == published.read_bytes()
    published.rename(tmp_path / "gone.npz")  # it is asked for once
    second = hmar("eval", "samples", samples, *flags)
    assert "downloading" not in second.stderr and values(json.loads(second.stdout)) == values(found)
    given = hmar("eval", "samples", samples, *flags, "--reference", tmp_path / "gone.npz")
    assert values(json.loads(given.stdout)) == values(found)
    for flag in (
        ("--count", 5),
        ("--metrics", "fid"),
        ("--extractor", run),
        ("--size", 4),
        ("--crop", "var"),
        ("--labels", "circle"),
    ):
        refused(hmar("eval", "samples", samples, *flags, *flag), f"--preset toy fixes {flag[0]}")
    refused(
        hmar("eval", "samples", samples, *flags, "--reference", REFERENCE),
        "toy measures against the toy file",
    )
    (samples / "000000.png").write_bytes(b"no image")
    (samples / "000001.png").write_bytes(b"no image")
    (samples / "000002.png").write_bytes(b"no image")
    refused(hmar("eval", "samples", samples, *flags), "toy measures 10 images, and 7 are there")
    monkeypatch.setitem(PRESETS, "toy", presets.Preset(**{**vars(toy), "size": 16}))
    refused(hmar("eval", "samples", samples, *flags), "is of images of 8 x 8, toy of 16 x 16")
    refused(hmar("eval", "samples", samples, "--preset", "to"), "no preset 'to'", "adm-imagenet-256")


def test_presets_are_those_of_the_papers() -> None:
    for size in (256, 512):
        preset = PRESETS[f"adm-imagenet-{size}"]
        assert (preset.extractor, preset.count, preset.size, preset.crop) == (
            "inception",
            50_000,
            size,
            "adm",
        )
        assert preset.metrics == ("fid", "sfid", "is", "precision", "recall")
        assert f"/imagenet/{size}/VIRTUAL_imagenet{size}" in preset.address
    coco = PRESETS["coco-30k"]
    assert (coco.extractor, coco.count, coco.size, coco.metrics) == ("inception", 30_000, 256, ("fid",))
    refused(
        hmar("eval", "samples", "builtin:shapes", "--preset", "coco-30k"),
        "coco-30k needs --reference",
        "coco:",
    )


def test_a_file_that_comes_torn_is_not_kept(tmp_path: Path) -> None:
    whole = tmp_path / "whole.npz"
    np.savez(whole, mu=np.zeros(1000))
    (tmp_path / "torn.npz").write_bytes(whole.read_bytes()[:-100])
    kept = tmp_path / "kept" / "file.npz"
    for name in ("torn.npz", "absent.npz"):
        with pytest.raises(UserError, match=f"{kept} is not there and cannot be downloaded: ") as error:
            fetch((tmp_path / name).as_uri(), kept, "a hint", whole=zipfile.is_zipfile)
        assert error.value.hint == "a hint" and not list(kept.parent.iterdir())
    assert fetch(whole.as_uri(), kept, "", whole=zipfile.is_zipfile) == kept
    assert kept.read_bytes() == whole.read_bytes()


def test_flags_that_draw_are_for_checkpoints(run: Path, samples: Path, model: Path) -> None:
    refused(measure(run, samples, "--cfg", 2, "--keep", "kept"), "nothing is drawn by --cfg, --keep")
    refused(measure(run, samples, "--top-k", 2, "--seed", 3), "nothing is drawn by --top-k, --seed")
    refused(measure(run, model), "can draw any number of images", "--count 10000")
    refused(measure(run, model, "--count", 4, "--labels", "cat"), "no class 'cat'")
    refused(measure(run, model, "--count", 4, "--prompt", "a cat"), "knows no text")
    refused(measure(run, run, "--count", 4), "holds a classifier, not a model")


def test_there_has_to_be_something_to_measure(run: Path, samples: Path, module: str) -> None:
    refused(hmar("eval", "samples", samples), "nothing to measure", "--reference SOURCE")
    refused(
        hmar("eval", "samples", samples, "--metrics", "is,kid"), "compares with real images", "--reference"
    )
    refused(hmar("eval", "samples", samples, "--metrics", "fud"), "no metric 'fud'")
    flags = ("--extractor", module, "--device", "cpu")
    refused(hmar("eval", "samples", samples, *flags), "nothing to measure: module:")
    refused(measure(run, samples, *flags, "--metrics", "is"), "is needs logits of classes")
    (samples / "sample.json").write_text(json.dumps({"labels": [0], "class_names": ["cat"]}))
    foreign = hmar("eval", "samples", samples, "--extractor", run, "--device", "cpu")
    refused(foreign, "nothing to measure: toy-classifier does not know the classes", "--reference")


def test_mistakes_are_one_line_and_a_hint(run: Path, recipe: Path, samples: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(measure(run, tmp_path / "empty"), "no images")
    refused(measure(run, tmp_path / "nowhere"), "no such source")
    refused(measure(run, samples, "--count", 1), "has 1 images that can be read")
    refused(measure(run, samples, "--reference", "builtin:shape"), "no built-in data")
    refused(measure(tmp_path / "no-run", samples), "no extractor")
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

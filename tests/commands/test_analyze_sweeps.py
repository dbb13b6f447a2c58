"""Sweeps of `hmar analyze` by the commands alone: plans, numbers, resuming, processes, training, mistakes."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_runs import hmar

from hmar_cli.analysis import sweep
from hmar_cli.builders import build_image_network
from hmar_cli.checkpoints.store import read_tensors, save_checkpoint, write_tensors
from hmar_cli.commands.sweeping import few_batches
from hmar_cli.console import console
from hmar_cli.data.shapes import SHAPES
from hmar_cli.evaluation import references
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Recipe
from hmar_cli.tokenizers.blocks import hash_weights

ROOT = Path(__file__).parents[2]
REFERENCE = "builtin:shapes?count=30&seed=1"
NEXT_SCALE = ("model.depth=2", "model.width=64", "model.heads=2", "model.num_classes=8")
MASKED_AR = (
    *("model.encoder_depth=1", "model.decoder_depth=1", "model.width=32", "model.heads=2"),
    *(
        "model.dense_head_depth=1",
        "model.dense_head_width=32",
        "model.num_classes=8",
        "tokenizer.channels=8",
        "tokenizer.latent_scale=1.0",
    ),
    *("sample.head_steps=2", "sample.pivot_head_steps=2", "sample.steps=2", "sample.pivot_steps=2"),
)
PIVOTS = ("model.dense_head_heads=2", "model.pivot_head_depth=1", "model.pivot_head_width=32")
MODELS = {
    "var": ("var-tiny", NEXT_SCALE),
    "refining": ("hmar-tiny-masked", (*NEXT_SCALE, "objective.layers=1")),
    "mar": ("mar-tiny", MASKED_AR),
    "himar": ("himar-tiny", (*MASKED_AR, *PIVOTS)),
}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, save_random: Callable[[Path, Recipe, tuple[str, ...]], None]
) -> Path:
    """A folder with a random model of each family, and a random classifier."""
    folder = tmp_path_factory.mktemp("sweeps")
    for name, (shipped, changes) in MODELS.items():
        save_random(folder / name, load_recipe(shipped, changes), SHAPES)
    recipe = load_recipe("classifier-tiny", ["model.num_classes=8", "model.channels=8"])
    torch.manual_seed(1)
    network = build_image_network(recipe)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = network.state_dict()
    fingerprint = hash_weights(weights, b"classifier")
    about: dict[str, Any] = {
        "class_names": SHAPES,
        "step": 1,
        "tokenizer": None,
        "tokenizer_hash": fingerprint,
    }
    save_checkpoint(folder / "judge", recipe=recipe, weights={"model": weights}, **about)
    return folder


def judged(world: Path) -> tuple[object, ...]:
    return ("--reference", REFERENCE, "--extractor", world / "judge", "--device", "cpu", "--json")


def analyze(world: Path, name: str, models: str, out: Path, *flags: object) -> dict[str, Any]:
    """What the command prints."""
    checkpoints = [world / each for each in models.split()]
    result = hmar("analyze", name, *checkpoints, *judged(world), "--out", out, *flags)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def plan(world: Path, name: str, models: str, *flags: object) -> list[dict[str, Any]]:
    """What the command would measure."""
    result = hmar("analyze", name, *[world / each for each in models.split()], "--dry-run", *flags)
    assert result.exit_code == 0, result.output
    trials: list[dict[str, Any]] = json.loads(result.stdout)["trials"]
    return trials


def refused(result: Any, message: str, hint: str = "") -> None:
    assert result.exit_code == 2 and result.stdout == "", result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert [line.startswith("error: ") for line in lines].count(True) == 1 and message in result.stderr
    assert lines[-1].startswith("hint: ") and hint in lines[-1], result.stderr


# Plans


def test_guidance_is_varied_by_what_each_family_calls_none(world: Path) -> None:
    trials = plan(world, "guidance", "var mar himar")
    seen = [(each["model"], each["varied"], each["value"]) for each in trials]
    assert seen[:2] == [("var", "cfg", 0.0), ("var", "cfg", 0.5)]
    assert [value for model, _, value in seen if model == "mar"] == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0]
    assert {varied for model, varied, _ in seen if model == "himar"} == {"cfg", "pivot_cfg"}
    for each in trials:
        assert each[each["varied"]] == each["value"]
    for each in (each for each in trials if each["varied"] == "pivot_cfg"):
        assert each["cfg"] == 2.5  # the recipe's


def test_refinement_changes_one_scale_at_a_time(world: Path) -> None:
    base, *longer = plan(world, "refinement", "refining")
    assert base["schedule"] == [] and base["varied"] == ""
    assert [each["value"] for each in longer] == [2, 3, 4, 5, 6]
    for each in longer:
        passes = [len(entry) for entry in each["schedule"]]
        assert passes == [2 if k == each["value"] else 1 for k in range(1, 7)]
        assert [sum(entry) for entry in each["schedule"]] == [1, 4, 9, 16, 36, 64]
    start = plan(world, "refinement", "refining", "--set", "schedule=1,2,3,1,1,1")
    assert [len(entry) for entry in start[0]["schedule"]] == [1, 2, 3, 1, 1, 1]
    assert [len(entry) for entry in start[2]["schedule"]] == [1, 2, 4, 1, 1, 1]


def test_phases_and_speed(world: Path) -> None:
    trials = plan(world, "phases", "himar", "--set", "pivot_steps=4")
    assert [(each["varied"], each["value"]) for each in trials] == [
        *(("pivot_steps", n) for n in (1, 2, 4)),
        *(("steps", n) for n in (1, 2, 4, 6, 8)),
    ]
    assert all(each["pivot_steps"] == 4 for each in trials if each["varied"] == "steps")
    trials = plan(world, "speed", "mar var")
    assert [each["value"] for each in trials] == [1, 2, 4, 8, 16, None]
    heads = plan(world, "speed", "mar himar", "--vary", "pivot_head_steps=2,3", "--vary", "head-steps=5")
    seen = [(each["model"], each["varied"], each["value"]) for each in heads]
    assert seen == [
        ("mar", "head_steps", 5),  # it has no pivots
        *(("himar", "pivot_head_steps", n) for n in (2, 3)),
        ("himar", "head_steps", 5),
    ]


def test_settings_of_one_family_leave_the_others_alone(world: Path) -> None:
    trials = plan(
        world, "ablation", "var mar himar", "--set", "pivot_cfg=3", "--set", "top_k=5", "--set", "cfg=2"
    )
    assert [each["cfg"] for each in trials] == [2, 2, 2]
    assert trials[0]["top_k"] == 5 and trials[2]["pivot_cfg"] == 3
    assert trials[1]["pivot_cfg"] == 2.7  # MAR has no use for it
    schedules = plan(world, "speed", "refining", "--vary", "schedule=none;1,2,1,1,1,1;single")
    assert [max(map(len, each["schedule"]), default=0) for each in schedules] == [0, 2, 64]


# Numbers


def test_a_sweep_gives_the_numbers_of_eval_samples(world: Path, tmp_path: Path) -> None:
    """Drawn in memory or into a folder, by another command: the same images, the same numbers."""
    flags = ("--count", 22, "--seed", 3, "--batch-size", 8, "--shown", 4)
    found = analyze(
        world, "guidance", "var", tmp_path / "out", *flags, "--vary", "cfg=0,3", "--metrics", "fid,is"
    )
    samples = tmp_path / "samples"
    drawn = hmar(
        "sample", "--checkpoint", world / "var", "--out", samples, *flags[:4], "--cfg", 3, "--device", "cpu"
    )
    assert drawn.exit_code == 0, drawn.output
    result = hmar("eval", "samples", samples, *judged(world), "--metrics", "fid,is")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["metrics"]
    row = found["rows"][1]
    assert (row["model"], row["varied"], row["value"]) == ("var", "cfg", 3.0)
    for metric in ("fid", "is", "accuracy"):
        assert row[metrics[metric]["name"]] == pytest.approx(metrics[metric]["value"], rel=1e-9)
    assert row[f"{metrics['is']['name']} ±"] == pytest.approx(metrics["is"]["spread"], rel=1e-9)
    assert row["s/image"] > 0 and row["images/s"] == pytest.approx(1 / row["s/image"])
    assert found["rows"][0][metrics["fid"]["name"]] != row[metrics["fid"]["name"]]
    strips = sorted((tmp_path / "out" / "trials").glob("*.png"))
    wanted = np.concatenate([np.asarray(Image.open(samples / f"{i:06d}.png")) for i in range(4)], axis=1)
    assert any(np.array_equal(np.asarray(Image.open(strip)), wanted) for strip in strips)


def test_the_files_hold_what_was_measured(world: Path, tmp_path: Path) -> None:
    found = analyze(
        world, "ablation", "mar himar", tmp_path, "--count", 12, "--metrics", "fid,precision,recall"
    )
    assert [Path(file).name for file in found["files"]] == [
        *("ablation.png", "ablation-grid.png", "ablation.csv", "ablation.json")
    ]
    written = json.loads((tmp_path / "ablation.json").read_text())
    assert written["rows"] == found["rows"] and written["settings"] == found["settings"]
    with (tmp_path / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["pivots"], row["scale vector"]) for row in rows] == [
        ("mar", "none", "none"),
        ("himar", "conditional", "table"),
    ]
    names = ["FID[classifier-tiny]-12", "Precision[classifier-tiny]-12", "Recall[classifier-tiny]-12"]
    assert [float(row[name]) for row in rows for name in names] == [
        each[name] for each in found["rows"] for name in names
    ]
    settings, about = written["settings"], written["settings"]["trials"][0]
    assert settings["judge"]["reference"]["source"] == REFERENCE and len(about["weights_sha256"]) == 64
    assert [each["recipe"] for each in settings["models"]] == ["mar-tiny", "himar-tiny"]
    assert about["steps"] == 2 and about["seed"] == 0 and about["precision"] == "fp32"
    with Image.open(tmp_path / "ablation-grid.png") as grid:
        assert grid.height == 2 * (64 + 4)  # a row a model


@pytest.mark.parametrize("reference", ["images", "statistics"])
def test_two_processes_measure_as_one(world: Path, tmp_path: Path, reference: str) -> None:
    flags = ("--count", "21", "--batch-size", "4", "--vary", "cfg=0,2", "--metrics", "fid,is,recall")
    if reference == "statistics":
        flags += ("--reference", str(statistics(world, tmp_path)))
    alone = analyze(world, "guidance", "var", tmp_path / "1", *flags)
    arguments = ["guidance", world / "var", *judged(world), "--out", tmp_path / "2", *flags, "--launch", "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / ".typing"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "hmar_cli", "analyze", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)  # said by one process
    assert len(shared["rows"]) == 2
    for mine, theirs in zip(alone["rows"], shared["rows"], strict=True):
        for name in (each for each in mine if "[" in each):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-9), name
    pictures = [(tmp_path / n / "guidance-grid.png").read_bytes() for n in "12"]
    assert pictures[0] == pictures[1]


def statistics(world: Path, folder: Path) -> Path:
    """A file of what the classifier sees in the reference."""
    path = folder / "reference.npz"
    flags = ("--metrics", "fid,is,recall", "--make-stats", path)
    done = hmar("eval", "samples", *judged(world)[1:], *flags)
    assert done.exit_code == 0, done.output
    return path


# Resuming


def test_what_was_measured_is_not_drawn_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--count", 6, "--batch-size", 4, "--metrics", "fid")
    first = analyze(world, "guidance", "mar", tmp_path, *flags, "--vary", "cfg=1,2")
    drawn: list[float] = []

    class Watched(sweep.Sampler):
        def __call__(self, indices: Sequence[int]) -> Any:
            drawn.append(self.job.settings.cfg)
            return super().__call__(indices)

    monkeypatch.setattr(sweep, "Sampler", Watched)
    again = analyze(world, "guidance", "mar", tmp_path, *flags, "--vary", "cfg=1,2")
    assert again == first and not drawn
    wider = analyze(world, "guidance", "mar", tmp_path, *flags, "--vary", "cfg=1,1.5,2,1.5")
    assert drawn == [1.5, 1.5]  # two batches; the value that comes twice is measured once
    assert [wider["rows"][0], wider["rows"][2]] == first["rows"]
    assert wider["rows"][1] == wider["rows"][3]
    drawn.clear()
    other = analyze(world, "guidance", "mar", tmp_path, *flags, "--vary", "cfg=1", "--metrics", "fid,recall")
    assert drawn == [1.0, 1.0]  # another judgement
    name = "FID[classifier-tiny]-6"
    assert other["rows"][0][name] == pytest.approx(first["rows"][0][name], rel=1e-12)
    drawn.clear()
    analyze(world, "guidance", "mar", tmp_path, *flags, "--vary", "cfg=1", "--seed", 1)
    assert drawn == [1.0, 1.0]


def test_other_weights_in_the_same_place_are_measured_anew(world: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "mar", model)
    flags = (*judged(world), "--out", tmp_path / "out", "--count", 6, "--metrics", "fid")
    before = hmar("analyze", "ablation", model, *flags)
    weights = read_tensors(model / "model.safetensors")
    write_tensors(model / "model.safetensors", {name: each + 0.2 for name, each in weights.items()})
    after = hmar("analyze", "ablation", model, *flags)
    assert before.exit_code == after.exit_code == 0, after.output
    name = "FID[classifier-tiny]-6"
    first, second = (json.loads(result.stdout)["rows"][0][name] for result in (before, after))
    assert first != second


def test_a_sweep_that_was_stopped_keeps_its_finished_trials(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--count", 4, "--vary", "cfg=0,1,2", "--metrics", "fid")
    calls = []

    class Stopped(sweep.Sampler):
        def __call__(self, indices: Sequence[int]) -> Any:
            calls.append(self.job.settings.cfg)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(indices)

    monkeypatch.setattr(sweep, "Sampler", Stopped)
    result = hmar("analyze", "guidance", world / "var", *judged(world), "--out", tmp_path, *flags)
    assert result.exit_code == 130 and not (tmp_path / "guidance.json").exists()
    found = analyze(world, "guidance", "var", tmp_path, *flags)
    assert calls == [0, 1, 1, 2]
    assert [row["value"] for row in found["rows"]] == [0, 1, 2]


# Training first


def test_an_ablation_trains_its_rows_and_keeps_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    tokenize = (
        "tokenize",
        "builtin:shapes?count=16",
        "--tokenizer",
        world / "tokenizers" / "mar",
        "--out",
        cache,
    )
    done = hmar(*tokenize, "--recipe", "himar-tiny", "--device", "cpu")
    assert done.exit_code == 0, done.output
    recipe = tmp_path / "toy.toml"
    lines = [each.replace("model.", "", 1) for each in MASKED_AR if each.startswith("model.")]
    recipe.write_text('extends = "mar-tiny"\n[model]\n' + "\n".join(lines) + "\n[tokenizer]\nchannels = 8\n")
    runs = tmp_path / "runs"
    flags = (*judged(world), "--train", cache, "--runs", runs, "--train-seeds", "0,1", "--count", 6)
    steps = ("--train-set", "train.steps=1", "--train-set", "train.batch_size=4", "--set", "head_steps=2")
    planned = hmar("analyze", "ablation", recipe, *flags, *steps, "--dry-run")
    assert json.loads(planned.stdout)["train"] == [str(runs / "toy-seed0"), str(runs / "toy-seed1")]
    assert not runs.exists()
    read, real = [], references.read_reference
    monkeypatch.setattr(references, "read_reference", lambda *given: read.append(given) or real(*given))
    steps += ("--reference", statistics(world, tmp_path))
    results = [
        hmar("analyze", "ablation", recipe, *flags, *steps, "--out", tmp_path / "out") for _ in range(2)
    ]
    assert len(read) == 2  # by each command once, before the training
    for result in results:
        assert result.exit_code == 0, result.output
        assert "toy, mean of 2 trainings: FID[classifier-tiny]-6 " in result.stderr
    first, second = (json.loads(result.stdout) for result in results)
    assert first == second  # the second found its runs and its trials
    name = "FID[classifier-tiny]-6"
    values = [row[name] for row in first["rows"]]
    assert [row["training seed"] for row in first["rows"]] == [0, 1] and values[0] != values[1]
    assert first["summary"]["toy"][name] == {
        "mean": pytest.approx(np.mean(values)),
        "spread": pytest.approx(np.std(values, ddof=1)),
        "trials": 2,
    }
    flags += ("--train-seeds", "0,1,2")
    planned = json.loads(hmar("analyze", "ablation", recipe, *flags, *steps, "--dry-run").stdout)
    assert planned["finished"] == [str(runs / "toy-seed0"), str(runs / "toy-seed1")]
    assert planned["train"] == [str(runs / "toy-seed2")]
    longer = (*steps, "--train-set", "train.steps=2", "--dry-run")
    assert json.loads(hmar("analyze", "ablation", recipe, *flags, *longer).stdout)["finished"] == []
    other = hmar("analyze", "ablation", recipe, *flags, "--train-set", "train.batch_size=8", *steps[:2])
    refused(other, "differ")  # a finished run of other settings is not taken for this one


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("guidance", "var", "--vary", "cfgg=1"), "has a setting 'cfgg'"),
        (("guidance", "var", "--set", "steps=4"), "has a setting 'steps'"),
        (("guidance", "var", "--vary", "cfg"), "--vary cfg: expected KEY=VALUE"),
        (("guidance", "var", "--vary", "cfg=1", "--vary", "cfg=2"), "comes twice"),
        (("guidance", "var", "--vary", "cfg=1,-2"), "sample.cfg: expected a number"),
        (("guidance", "mar", "--vary", "steps=17"), "at most one a token"),
        (("guidance", "himar", "--vary", "cfg_schedule=steep"), "sample.cfg_schedule"),
        (("guidance", "var", "--metrics", "fid,psnr"), "no metric 'psnr'"),
        (("guidance", "var", "--labels", "zebra"), "no class 'zebra'"),
        (("guidance", "var", "--weights", "ema"), "has no weights 'ema'"),
        (("guidance", "var", "--extractor", "module:torch:nothing"), "nothing"),
        (("guidance", "nothing"), "no such checkpoint"),
        (("guidance", "judge"), "holds a classifier"),
        (("guidance", "var", "--extractor", "nowhere/"), "nowhere"),
        (("guidance", "var", "--reference", ""), "--reference is missing"),
        (("guidance", "var", "--reference", "nowhere.npz"), "nowhere.npz"),
        (("phases", "mar"), "has no two phases"),
        (("refinement", "var"), "has no masked branch"),
        (("refinement", "mar"), "is a MAR or Hi-MAR"),
        (("refinement", "refining", "--set", "schedule=1,2"), "expected passes for 6 scales"),
        (("ablation", "var", "--train-seeds", "0,1"), "--train-seeds is for --train"),
        (("ablation", "var", "--vary", "cfg=1,2"), "`hmar analyze ablation` has no place for it"),
        (("refinement", "refining", "--vary", "cfg=1"), "`hmar analyze refinement` has no place for it"),
    ],
)
def test_mistakes(world: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    name, model, *flags = arguments
    given = ("--count", 4, "--out", tmp_path, "--device", "cpu", "--extractor", world / "judge")
    result = hmar("analyze", name, world / model, *given, "--reference", REFERENCE, *flags)
    refused(result, message)
    assert not list(tmp_path.iterdir())


def test_mistakes_of_training(world: Path, tmp_path: Path) -> None:
    flags = (*judged(world), "--runs", tmp_path / "runs")
    refused(hmar("analyze", "ablation", *flags), "no checkpoints to measure", "--train CACHE")
    train = ("--train", tmp_path / "cache")
    refused(hmar("analyze", "ablation", "mar-tinny", *flags, *train), "no recipe named 'mar-tinny'")
    refused(hmar("analyze", "ablation", "mar-tiny", *flags, *train, "--train-seeds", "a"), "expected numbers")
    refused(hmar("analyze", "ablation", "mar-tiny", *flags, *train, "--metrics", "x"), "no metric 'x'")
    ablation = ("analyze", "ablation", "mar-tiny", *flags, *train)
    refused(hmar(*ablation, "--metrics", "sfid"), "which classifier-tiny has not")
    refused(hmar(*ablation, "--set", "cgf=2"), "none of these models has a setting 'cgf'")
    refused(hmar(*ablation, "--vary", "cfg=2"), "has no place for it")
    refused(hmar(*ablation, "--reference", tmp_path / "nowhere"), "no such source")
    (tmp_path / "file").write_text("")
    refused(hmar(*ablation, "--out", tmp_path / "file"), "file is a file")
    assert not (tmp_path / "runs").exists()


def test_too_few_images_are_warned_of_before_any_is_drawn(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sweep.measure_trial
    monkeypatch.setattr(sweep, "measure_trial", lambda *given: console.print("[draws]") or real(*given))
    flags = (*judged(world), "--out", tmp_path, "--count", 12, "--vary", "cfg=1", "--metrics", "fid,is")
    result = hmar("analyze", "guidance", world / "var", *flags)
    assert result.exit_code == 0, result.output
    before, after = result.stderr.split("[draws]\n")
    for words in (
        "FID by 12 images of each setting says little",
        "IS by 12 images of each setting says",
        f"FID by 30 images of {REFERENCE} says little",
    ):
        assert words in before
    assert before.count("IS by") == 1 and "says little" not in after


@pytest.mark.parametrize(("size", "number"), [(12, 1), (5, 2), (4, 3)])
def test_too_few_batches_to_time_one_are_warned_of(
    world: Path, tmp_path: Path, size: int, number: int
) -> None:
    """The last batch, which is not full, is not timed."""
    batches = ("--count", 14, "--batch-size", size, "--vary", "cfg=1", "--metrics", "fid")
    result = hmar("analyze", "guidance", world / "var", *judged(world), "--out", tmp_path, *batches)
    assert result.exit_code == 0, result.output
    line = f"s/image by full batches of {size} says little: a process has {number}, and the first 2 load"
    assert (line in result.stderr) == (number < 3) == ("s/image" in result.stderr)


@pytest.mark.parametrize(("processes", "number"), [(1, 0), (3, 2), (4, 2), (6, 1)])
def test_each_process_has_its_share_of_the_batches(processes: int, number: int) -> None:
    """Of 6 full ones; where there are 3 or more, nothing is said."""
    trials: list[Any] = [SimpleNamespace(job=SimpleNamespace(count=27, batch_size=4))]
    told = few_batches(trials, processes)
    assert [f"a process has {number}, " in line for line in told] == [True] * (number > 0)


def test_statistics_of_another_cut_are_refused_before_anything_is_drawn(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "var.npz"
    done = hmar("eval", "samples", *judged(world)[1:], "--crop", "var", "--make-stats", path)
    assert done.exit_code == 0, done.output
    flags = (*judged(world), "--reference", path, "--out", tmp_path / "out", "--count", 4)
    refused(hmar("analyze", "guidance", world / "var", *flags), "as by --crop var", "--crop var")
    assert not (tmp_path / "out").exists()


def test_a_kept_trial_that_is_broken_is_named(world: Path, tmp_path: Path) -> None:
    flags = ("--count", 4, "--vary", "cfg=1", "--metrics", "fid")
    analyze(world, "guidance", "var", tmp_path, *flags)
    (kept,) = (tmp_path / "trials").glob("*.json")
    for content in ("{", "[]", json.dumps({"cells": {}, "images": 5})):
        kept.write_text(content)
        result = hmar("analyze", "guidance", world / "var", *judged(world), "--out", tmp_path, *flags)
        refused(result, f"{kept.name} is broken", "delete it")

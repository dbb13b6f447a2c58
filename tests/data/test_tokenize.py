import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cache import contents, flip_last_bit
from toy_runs import MSVQ, hmar
from typer.testing import Result

from hmar_cli.builders import build_tokenizer, load_tokenizer
from hmar_cli.checkpoints.store import open_checkpoint, save_checkpoint
from hmar_cli.data.cache import Cache
from hmar_cli.data.sources import open_source
from hmar_cli.data.transforms import image_transform, to_tensor
from hmar_cli.errors import UserError
from hmar_cli.files import file_sha256
from hmar_cli.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPE = f"""
name = "toy-msvq"
[data]
source = "builtin:shapes?count=10"
size = 8
mirror = false
{MSVQ}
[objective]
kind = "msvq"
perceptual = "none"
"""


def summary_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random tokenizer, whose averaged weights differ from the others."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "toy.toml").write_text(RECIPE)
    recipe = load_recipe(str(folder / "toy.toml"))
    torch.manual_seed(0)
    model, ema = build_tokenizer(recipe.tokenizer), build_tokenizer(recipe.tokenizer)
    save_checkpoint(
        folder / "step-00000001",
        recipe=recipe,
        weights={"model": model.state_dict(), "ema": ema.state_dict()},
        class_names=(),
        step=1,
        tokenizer=None,
        tokenizer_hash=ema.fingerprint(),
        licence="MIT",
    )
    return folder


def test_a_cache_holds_what_the_tokenizer_says(tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    options = ("--set", "data.mirror=true", "--shard-size", 8, "--batch-size", 4, "--verify", "--json")
    summary = summary_of(
        hmar("tokenize", "builtin:shapes?count=21", "--tokenizer", tokenizer, "--out", out, *options)
    )
    assert (summary["verified"]["files"], summary["verified"]["equal"]) == (3 * 4, 1.0)
    assert (summary["images"], summary["views"], summary["encoded_now"]) == (21, 2, 21)
    assert summary["tokens"] == 1 + 4 + 16
    cache, source = Cache.open(out), open_source("builtin:shapes?count=21", size=8)
    model = load_tokenizer(tokenizer)
    assert summary["bytes"] == cache.size
    assert cache.manifest.tokenizer_hash == model.fingerprint() == summary["tokenizer_hash"]
    assert tuple(cache.manifest.class_names) == source.class_names
    assert summary["label_counts"] == dict(
        zip(source.class_names, np.bincount(cache.labels, minlength=8), strict=True)
    )
    cut = image_transform(8, "adm", train=False)
    pixels = np.stack([cut(source[i].image) for i in range(21)])  # type: ignore[arg-type]
    pictures = np.stack([pixels, pixels[:, :, ::-1]], axis=1).reshape(42, 8, 8, 3)
    with torch.inference_mode():  # four at once, as above: rounding depends on it
        tokens = [model.encode(to_tensor(pictures[i : i + 4])).numpy() for i in range(0, 42, 4)]
    cached = cache.fetch("tokens", np.arange(21).repeat(2), np.tile([0, 1], 21))
    np.testing.assert_array_equal(cached, np.concatenate(tokens))
    assert cache.manifest.arrays["tokens"] == {"dtype": "uint16", "shape": [21], "per": "view"}


def test_a_cache_carries_the_weights_that_made_it(tokenizer: Path, tmp_path: Path) -> None:
    summary_of(hmar("tokenize", "--tokenizer", tokenizer, "--out", tmp_path / "c", "--json"))
    cache = Cache.open(tmp_path / "c")
    assert sorted(path.name for path in cache.tokenizer_path.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
        "recipe.toml",
    ]
    carried = load_tokenizer(tmp_path / "c")
    assert carried.fingerprint() == cache.manifest.tokenizer_hash
    assert open_checkpoint(cache.tokenizer_path).licence == "MIT"
    again = summary_of(hmar("tokenize", "--tokenizer", tmp_path / "c", "--out", tmp_path / "d", "--json"))
    assert again["tokenizer_hash"] == cache.manifest.tokenizer_hash
    assert again["images"] == 10  # the source of the tokenizer's own recipe


def test_summary_for_people(tokenizer: Path, tmp_path: Path) -> None:
    arguments = (
        "tokenize",
        "builtin:shapes?count=9",
        "--tokenizer",
        tokenizer,
        "--out",
        tmp_path / "c",
        "--limit",
        6,
    )
    first = hmar(*arguments)
    assert first.exit_code == 0
    assert "6 images of 8 classes, one view each" in first.stdout
    assert "images/s" in first.stdout and "tokenizing" in first.stderr
    again = hmar(*arguments, "--verify")
    assert "was complete already" in again.stdout
    assert "verified: 4 files unchanged, 100.000% of tokens equal in 6 images" in again.stdout


def test_images_without_classes_are_said_to_be_of_one(tokenizer: Path, tmp_path: Path, folder: Path) -> None:
    arguments = ("--tokenizer", tokenizer, "--out", tmp_path / "c", "--dry-run")
    line = "  no subfolders or labels: one class, 'image'"
    assert line in hmar("tokenize", folder / "dog", *arguments).stdout.splitlines()
    assert line not in hmar("tokenize", folder, *arguments).stdout.splitlines()


def test_dry_run_writes_nothing(tokenizer: Path, tmp_path: Path) -> None:
    arguments = (
        "tokenize",
        "builtin:shapes?count=9",
        "--tokenizer",
        tokenizer,
        "--out",
        tmp_path / "c",
        "--dry-run",
    )
    assert "would encode 9 images" in hmar(*arguments).stdout
    plan = summary_of(hmar(*arguments, "--json"))
    assert (plan["images"], plan["done"], plan["bytes"]) == (9, 0, 9 * 21 * 2)
    assert not (tmp_path / "c").exists()


def test_unusable_images(tokenizer: Path, tmp_path: Path, folder: Path) -> None:
    arguments = ("tokenize", folder, "--tokenizer", tokenizer)
    result = hmar(*arguments, "--out", tmp_path / "c", "--json")
    (skipped,) = summary_of(result)["skipped"]
    assert f"skipped image {skipped['index']}: {skipped['reason']}" in result.stderr
    assert Cache.open(tmp_path / "c").manifest.skipped == [skipped]
    assert "skipped 1 images" in hmar(*arguments, "--out", tmp_path / "c").stdout
    strict = hmar(*arguments, "--out", tmp_path / "d", "--strict")
    assert strict.exit_code == 2
    assert f"error: image {skipped['index']} of {folder} cannot be used" in strict.stderr
    assert "hint: " in strict.stderr


def test_streaming_webdataset(tokenizer: Path, tmp_path: Path, tar: Path) -> None:
    result = hmar(
        "tokenize",
        f"{tar}?streaming=true&classes=3",
        "--tokenizer",
        tokenizer,
        "--out",
        tmp_path / "c",
        "--json",
    )
    assert summary_of(result)["label_counts"] == {"0": 2, "1": 2, "2": 1}
    cache = Cache.open(tmp_path / "c")
    assert cache.captions(np.arange(2)) == [("number 0",), ("number 1",)]


def test_verify_finds_changed_files_and_changed_tokens(tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    arguments = ("tokenize", "--tokenizer", tokenizer, "--out", out)
    assert hmar(*arguments).exit_code == 0
    target = out / "shards/shard-00000.tokens.npy"
    old = file_sha256(target)
    np.save(target, (np.load(target) + 1) % 32)
    for path in (out / "manifest.json", out / "shards/shard-00000.json"):  # as if it had been encoded so
        path.write_text(path.read_text().replace(old, file_sha256(target)))
    result = hmar(*arguments, "--verify")
    assert result.exit_code == 2
    assert "error: verification failed: of 10 images encoded again, only 0.0% of the tokens" in result.stderr
    flip_last_bit(target)
    with pytest.raises(UserError, match="has changed"):
        Cache.open(out)
    assert hmar(*arguments, "--verify").exit_code == 0  # the broken shard was made again


def test_mistakes(tokenizer: Path, tmp_path: Path) -> None:
    def message(*arguments: object) -> str:
        result = hmar("tokenize", *arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr and result.stdout == ""
        return result.stderr

    out = ("--out", tmp_path / "c")
    assert "error: no such checkpoint" in message("--tokenizer", tmp_path / "nothing", *out)
    assert "error: no such source: photos\nhint: " in message("photos", "--tokenizer", tokenizer, *out)
    assert "has scales [1, 2, 3" in message("--recipe", "var-d16", "--tokenizer", tokenizer, *out)
    assert "data.size" in message("--set", "data.size=16", "--tokenizer", tokenizer, *out)
    assert "--device tpu" in message("--device", "tpu", "--tokenizer", tokenizer, *out)
    assert hmar("tokenize", "--tokenizer", tokenizer, *out).exit_code == 0
    assert "other settings (mirror)" in message("--set", "data.mirror=true", "--tokenizer", tokenizer, *out)


def test_recipe_with_another_stride_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    other = RECIPE.replace("multipliers = [1, 1]", "multipliers = [1, 1, 1]").replace(
        "size = 8", "size = 16", 1
    )
    (tmp_path / "other.toml").write_text(other)
    result = hmar(
        "tokenize", "--recipe", tmp_path / "other.toml", "--tokenizer", tokenizer, "--out", tmp_path / "c"
    )
    assert result.exit_code == 2
    assert "encodes images of 8 x 8 pixels, the recipe asks for 16 x 16" in result.stderr


def start(*arguments: object) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / ".typing"), *sys.path])
    command = [sys.executable, "-m", "hmar_cli", *(str(argument) for argument in arguments)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_and_a_killed_one_make_the_same_cache(tokenizer: Path, tmp_path: Path) -> None:
    arguments = (
        "tokenize",
        "builtin:shapes?count=90",
        "--tokenizer",
        tokenizer,
        "--shard-size",
        8,
        "--device",
        "cpu",
        "--batch-size",
        2,
    )
    assert hmar(*arguments, "--out", tmp_path / "whole").exit_code == 0
    whole = contents(tmp_path / "whole")

    both = start(*arguments, "--out", tmp_path / "both", "--launch", 2)
    output, errors = both.communicate(timeout=120)
    assert both.returncode == 0, errors
    assert output.count("90 images of 8 classes") == 1  # said by one process
    assert "one of 2 processes" in errors
    assert contents(tmp_path / "both") == whole

    killed = start(*arguments, "--out", tmp_path / "killed")
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed/shards/shard-00000.json").exists() and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed/manifest.json").exists()
    result = hmar(*arguments, "--out", tmp_path / "killed")
    assert result.exit_code == 0 and "going on after" in result.stderr
    assert contents(tmp_path / "killed") == whole


def test_one_process_that_stops_ends_all_with_its_message_alone(tokenizer: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(photos / f"{i}.png")
    (photos / "3.png").write_bytes(b"no picture")  # the second process's
    arguments = ("--tokenizer", tokenizer, "--shard-size", 1, "--device", "cpu", "--out", tmp_path / "c")
    both = start("tokenize", photos, *arguments, "--strict", "--launch", 2)
    output, errors = both.communicate(timeout=120)
    assert both.returncode == 2 and output == ""
    assert errors.count("error: ") == 1 and "error: image 3 of" in errors
    assert "Traceback" not in errors

"""`hmar sample` in several processes, started as a user starts them: the files of one process, to the byte."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_runs import MSVQ, run_python

from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Recipe

NAMES = ("circle", "square", "star")
MODEL = f"""
[data]
size = 8
{MSVQ}
[model]
depth = 2
width = 32
heads = 2
gamma_init = 0.1
num_classes = 3
[objective]
kind = "masked"
layers = 1
[sample]
top_k = 8
schedule = [[1], [1, 3], [4, 12]]
"""
SaveRandom = Callable[[Path, Recipe, tuple[str, ...]], None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, save_random: SaveRandom) -> Path:
    """A random HMAR with both branches, and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "model.toml").write_text(MODEL)
    save_random(folder / "model", load_recipe(str(folder / "model.toml")), NAMES)
    return folder / "model"


def sample(checkpoint: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = ("-m", "hmar_cli", "sample", "--checkpoint", checkpoint, "--out", out)
    return run_python(*command, "--device", "cpu", *more)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "sample.json"}


def test_two_processes_draw_the_files_of_one(checkpoint: Path, tmp_path: Path) -> None:
    drawn, records = {}, {}
    for processes, batch in ((1, 3), (2, 2)):
        out = tmp_path / str(processes)
        flags = ("--count", "7", "--seed", "5", "--batch-size", str(batch), "--npz", "--json")
        done = sample(checkpoint, out, *flags, "--launch", str(processes))
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)  # said by one process
        assert summary["already_there"] == 0 and summary["precision"] == "fp32"
        assert done.stderr.count("7 images in") == 1
        drawn[processes], records[processes] = files(out), json.loads((out / "sample.json").read_text())
    assert sorted(drawn[1]) == [*(f"{i:06d}.png" for i in range(7)), "grid.png", "samples.npz"]
    assert len({drawn[1][f"{i:06d}.png"] for i in range(7)}) == 7
    assert drawn[2] == drawn[1]
    made = [records[processes].pop("made_with") for processes in (1, 2)]
    assert [about["processes"] for about in made] == [1, 2]
    assert records[2] == records[1]
    assert records[1]["class_names"] == list(NAMES) and records[1]["schedule"] == [[1], [1, 3], [4, 12]]


def test_two_processes_go_on_and_refuse_as_one(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sample(checkpoint, out, "--count", "5").returncode == 0
    whole = files(out)
    for i in (0, 3):
        (out / f"{i:06d}.png").unlink()
    (out / ".000003.png.4711.tmp").write_bytes(b"half")  # as a killed run leaves it
    done = sample(checkpoint, out, "--count", "5", "--launch", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["already_there"] == 3
    assert files(out) == whole
    other = sample(checkpoint, out, "--count", "5", "--seed", "1", "--launch", "2")
    assert other.returncode == 2 and other.stderr.count("holds images of other settings (seed)") == 1
    assert "  seed: 0 there, 1 now" in other.stderr
    assert "Traceback" not in other.stderr
    assert files(out) == whole
    wrong = sample(checkpoint, tmp_path / "wrong", "--labels", "circel", "--launch", "2")
    assert wrong.returncode == 2 and wrong.stderr.count("error: no class 'circel'") == 1
    assert "circle" in wrong.stderr.splitlines()[-1]
    assert not (tmp_path / "wrong").exists()

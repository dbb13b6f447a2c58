"""Runs of the real command that are killed hard and resumed, in processes of their own."""

import signal
from pathlib import Path

import pytest
from toy_runs import run_python

from hmar_cli.checkpoints.store import list_steps
from hmar_cli.training.logging import read_rows

KILLED = Path(__file__).with_name("killed.py")


def hmar(moment: str, toys: Path, cache: Path, out: Path, *more: str):
    """Run `hmar train` on the toy recipe; "step:99" never comes."""
    recipe = str(toys / "toy.toml")
    return run_python(
        KILLED, moment, "train", "--recipe", recipe, "--data", cache, "--out", out, "--device", "cpu", *more
    )


def numbers(out: Path) -> list[dict]:
    rows = read_rows(out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


def weights(out: Path, step: int) -> dict[str, bytes]:
    folder = out / f"step-{step:08d}"
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert set(files) >= {"model.safetensors", "ema.safetensors", "training/optimizer.safetensors"}
    return files


@pytest.fixture(scope="module")
def whole(toys, cache, tmp_path_factory) -> Path:
    """Twenty steps without a break, saved after ten and twenty; an epoch has three and a half."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = hmar("step:99", toys, cache, out)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in numbers(out)] == list(range(1, 21))
    return out


def test_twenty_steps_equal_ten_and_ten(toys, cache, whole, tmp_path):
    out = tmp_path / "parts"
    assert hmar("step:13", toys, cache, out).returncode == -signal.SIGKILL
    assert [row["step"] for row in numbers(out)][-1] == 13  # three steps that no checkpoint holds
    assert [path.name for path in list_steps(out)] == ["step-00000010"]
    # once more, while the last checkpoint is being written
    assert hmar("write:20", toys, cache, out, "--resume").returncode == -signal.SIGKILL
    assert [path.name for path in list_steps(out)] == ["step-00000010"]
    done = hmar("step:99", toys, cache, out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert numbers(out) == numbers(whole)  # losses, accuracies, norms and rates to the last bit
    assert weights(out, 20) == weights(whole, 20)
    assert not list(out.glob(".step-*"))  # the half-written one is gone


def test_killed_before_the_first_checkpoint_and_while_deleting_an_old_one(toys, cache, whole, tmp_path):
    out, keep = tmp_path / "parts", ("--set", "train.keep=1")
    assert hmar("write:10", toys, cache, out, *keep).returncode == -signal.SIGKILL
    assert not list_steps(out)
    assert hmar("delete:10", toys, cache, out, *keep, "--resume").returncode == -signal.SIGKILL
    assert [path.name for path in list_steps(out)] == ["step-00000020"]
    done = hmar("step:99", toys, cache, out, *keep, "--resume")
    assert done.returncode == 0, done.stderr
    assert not list(out.glob(".step-*"))
    assert numbers(out) == numbers(whole)
    assert weights(out, 20) == weights(whole, 20)


def test_ctrl_c_saves_and_says_how_to_go_on(toys, cache, whole, tmp_path):
    out = tmp_path / "run"
    done = hmar("interrupt:4", toys, cache, out)
    assert done.returncode == 130
    assert "--resume" in done.stderr.splitlines()[-1]
    assert [path.name for path in list_steps(out)] == ["step-00000005"]
    assert numbers(out) == numbers(whole)[:5]

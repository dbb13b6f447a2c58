"""Several processes on the CPU, started as a user starts them."""

import json
import signal
from pathlib import Path

import pytest
from toy_runs import run_python

from hmar_cli.checkpoints.store import list_steps
from hmar_cli.launch import delegate, without_launch
from hmar_cli.training.logging import read_rows

QUIET = ("model.drop_path=0", "objective.label_drop=0", "train.steps=4", "train.log_every=1")


def test_two_processes_train_like_one(toys, cache, tmp_path):
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = ["-m", "hmar_cli", "train", "--recipe", toys / "toy.toml", "--data", cache, "--out", out]
        settings = [word for setting in QUIET for word in ("--set", setting)]
        done = run_python(*command, *settings, "--device", "cpu", "--launch", str(processes))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("checkpoint: ") == 1  # one process reports
        assert done.stderr.count("attention: sdpa (") == 1
        assert "Warning" not in done.stderr
        found[processes] = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in found[2]] == [1, 2, 3, 4]
    for one, two in zip(found[1], found[2], strict=True):
        for name in ("loss", "accuracy", "grad_norm_model", "cross_entropy_per_scale"):
            assert two[name] == pytest.approx(one[name], rel=2e-5), name


def test_a_mistake_ends_all_processes_with_its_exit_code(toys, cache, tmp_path):
    recipe = toys / "toy.toml"
    done = run_python(
        "-m", "hmar_cli", "train", "--recipe", recipe, "--data", cache, "--out", tmp_path / "run",
        "--set", "train.batch_size=9", "--set", "train.accumulate=1", "--device", "cpu", "--launch", "2",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("error: train.batch_size 9 cannot be shared by 2 processes") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def told_to_end(out: Path, how: str) -> tuple[int, int, list[list[int]]]:
    """Exit code, seconds that the launcher waits, and of each process that came to its end its step and signal."""
    done = run_python(Path(__file__).with_name("told_to_end.py"), out, how)
    ends = [json.loads(path.read_text()) for path in sorted(out.glob("rank-*.json"))]
    print(done.stderr)  # shown where a test fails
    return done.returncode, int((out / "seconds").read_text()), ends


def test_processes_that_are_told_to_end_have_time_to_save(tmp_path):
    code, seconds, ends = told_to_end(tmp_path, "launcher")
    assert (code, seconds) == (128 + signal.SIGTERM, 600)
    assert ends[0] == ends[1] and ends[0][1] == signal.SIGTERM
    assert list_steps(tmp_path)[-1].name == f"step-{ends[0][0]:08d}"


def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path):
    _, _, ends = told_to_end(tmp_path, "process")
    assert ends == [[3, signal.SIGTERM]] * 2  # it came after the numbers of step 2 were shared
    assert [path.name for path in list_steps(tmp_path)] == ["step-00000003"]


def test_processes_that_another_one_left_have_less_time(tmp_path):
    code, seconds, ends = told_to_end(tmp_path, "failure")
    assert (code != 0, seconds, ends) == (True, 30, [])


def test_launch_is_not_passed_on():
    assert without_launch(["train", "--launch", "2", "--out", "a"]) == ["train", "--out", "a"]
    assert without_launch(["train", "--launch=2", "--resume"]) == ["train", "--resume"]
    assert delegate(1) is None
    assert delegate(0) is None

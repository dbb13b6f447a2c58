"""Several processes on the CPU, started as a user starts them."""

import pytest
from toy_runs import run_python

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


def test_launch_is_not_passed_on():
    assert without_launch(["train", "--launch", "2", "--out", "a"]) == ["train", "--out", "a"]
    assert without_launch(["train", "--launch=2", "--resume"]) == ["train", "--resume"]
    assert delegate(1) is None
    assert delegate(0) is None

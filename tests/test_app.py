"""Mistakes of every kind are shown in one way: a line, a hint, exit code 2."""

import errno
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.commands import recipes


def hmar(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, prog_name="hmar")


@pytest.mark.parametrize(
    ("arguments", "message", "command"),
    [
        (["--bogus"], "No such option --bogus", "hmar"),
        (["bogus"], "No such command bogus", "hmar"),
        (["recipes", "bogus"], "No such command bogus", "hmar recipes"),
        (["train", "--rescipe", "hmar-tiny"], "No such option --rescipe", "hmar train"),
        (["tokenize"], "Missing option --tokenizer", "hmar tokenize"),
        (["sample", "--checkpoint", "x", "--top-p", "3"], "Invalid value for --top-p", "hmar sample"),
        (["checkpoint", "import", "f", "--out", "x"], "Missing option --format", "hmar checkpoint import"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str, command: str) -> None:
    result = hmar(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    first, hint = result.stderr.splitlines()
    plain = first.replace("'", "").replace("option: ", "option ")  # as versions of the library spell it
    assert plain.startswith(f"error: {message}")
    assert hint == f"hint: `{command} --help` shows every flag, with examples"


@pytest.mark.parametrize("arguments", [[], ["recipes"], ["checkpoint"], ["eval"], ["analyze"]])
def test_without_arguments_there_is_help(arguments: list[str]) -> None:
    result = hmar(*arguments)
    assert "Usage: " in result.stdout and "Commands" in result.stdout
    assert "error: " not in result.stderr


def test_a_gpu_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemoryError(RuntimeError):  # PyTorch's, by name
        pass

    def fill() -> list[str]:
        raise OutOfMemoryError("Tried to allocate 80.00 GiB.")

    monkeypatch.setattr(recipes, "recipe_names", fill)
    result = hmar("recipes", "list")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == "error: the GPU is out of memory: Tried to allocate 80.00 GiB."
    assert result.stderr.splitlines()[-1].startswith("hint: ")


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        raise RuntimeError("a fault")

    monkeypatch.setattr(recipes, "recipe_names", fail)
    assert str(hmar("recipes", "list").exception) == "a fault"


def test_a_closed_pipe_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed() -> list[str]:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(recipes, "recipe_names", closed)
    result = hmar("recipes", "list")
    assert result.exit_code == 1 and result.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["tokenize", "--tokenizer", "x", "--out", "y"],
        ["train", "--recipe", "hmar-tiny"],
        ["finetune-masked", "x"],
        ["sample", "--checkpoint", "x"],
        ["bench-attention"],
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_a_device_that_is_not_there(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device, message in (("cuda", "no GPU is visible to PyTorch"), ("tpu", "unknown")):
        result = hmar(*arguments, "--device", device)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[0] == f"error: --device {device}: {message}"


def test_a_path_through_a_file_is_one_line_and_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n')
    result = hmar("curves", str(tmp_path / "run"), "--out", str(tmp_path / "file" / "curves.png"))
    assert result.exit_code == 2
    first, hint = result.stderr.splitlines()
    assert first.startswith("error: ") and str(tmp_path / "file") in first and hint.startswith("hint: ")

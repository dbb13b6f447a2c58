"""`hmar bench-sampling` on small models, on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.models.masked import MaskedTransformer

runner = CliRunner()


def run(*arguments: str) -> list[dict]:
    result = runner.invoke(app, ["bench-sampling", *arguments, "--device", "cpu", "--seconds", "0", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["sampling"]["rows"]


def test_rows_and_files(tmp_path: Path) -> None:
    """Refined VAR-like drawing, and both phases of Hi-MAR with few steps."""
    small = ("--set", "sample.steps=2")
    rows = run("hmar-tiny-masked", "--batch-sizes", "1,2", "--no-compile", "--out", str(tmp_path))
    steps = (
        "--set",
        "sample.pivot_steps=2",
        "--set",
        "sample.head_steps=2",
        "--set",
        "sample.pivot_head_steps=2",
    )
    rows += run(
        "himar-tiny", "--batch-sizes", "1", "--no-compile", *small, *steps, "--out", str(tmp_path / "second")
    )
    assert [(row["recipe"], row["batch"], row["compiled"]) for row in rows] == [
        ("hmar-tiny-masked", 1, False),
        ("hmar-tiny-masked", 2, False),
        ("himar-tiny", 1, False),
    ]
    for row in rows:
        assert row["status"] == "ok" and row["repeats"] >= 2
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["median_ms"])
    kept = json.loads((tmp_path / "sampling.json").read_text())
    assert kept["complete"] and kept["rows"] == rows[:2] and kept["device"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("msvq-tiny",), "msvq-tiny draws no images of classes"),
        (("himar-scenes-tiny",), "himar-scenes-tiny draws no images of classes"),
        (("classifier-tiny",), "classifier-tiny draws no images of classes"),
        (("hmar-tiny", "--batch-sizes", "0"), "expected positive whole numbers"),
        (("hmar-tiny", "--precision", "fp16"), "'fp16' is not one of 'auto', 'bf16', 'fp32'"),
    ],
)
def test_what_cannot_be_measured(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = runner.invoke(
        app, ["bench-sampling", *arguments, "--device", "cpu", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "out").exists()


def test_a_model_without_room_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(MaskedTransformer, "to", refuse)
    rows = run("himar-tiny", "hmar-tiny", "--batch-sizes", "1", "--out", str(tmp_path))
    assert [(row["recipe"], row["status"]) for row in rows] == [
        ("himar-tiny", "out of memory"),
        ("hmar-tiny", "ok"),
    ]

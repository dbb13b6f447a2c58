"""`hmar bench-attention` on tiny shapes, on the CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hmar_kernels.masked
import hmar_kernels.sdpa
import numpy as np
import pytest
import torch
from hmar_kernels import IMPLEMENTATIONS
from PIL import Image
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.benchmarks import attention, run
from hmar_cli.benchmarks.run import TIMED
from hmar_cli.commands.bench_attention import base_grid
from hmar_cli.errors import UserError

TINY = (
    "--sides",
    "1,2,3x4",
    "--heads",
    "2",
    "--batch",
    "2",
    "--head-size",
    "16",
    "--seconds",
    "0",
    "--device",
    "cpu",
)


def hmar(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench-attention", *map(str, arguments)])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "speed.json").read_text())["rows"]
    return rows


def assert_drawn(path: Path) -> None:
    with Image.open(path) as image:
        assert np.asarray(image.convert("L")).std() > 5, path


def test_attention_is_checked_timed_and_drawn(tmp_path: Path) -> None:
    names = ("--implementations", "masked,sdpa,flex,varlen")
    result = hmar(*TINY, *names, "--dtypes", "fp32,bf16", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert "no GPU" in result.stderr and "masked, diagonal 1,2,3x4: forward " in result.stderr
    assert " ms (B2 H2 D16, bf16, normalised)\n" in result.stderr
    document = json.loads(result.stdout)["speed"]
    assert document == json.loads((tmp_path / "speed.json").read_text())
    assert document["complete"] and "4 D per visible pair" in document["flop_model"]
    rows = document["rows"]
    assert len(rows) == 2 * 2 * 2 * 4  # dtypes, normalisation, patterns, implementations
    for row in rows:
        timed = row["implementation"] in ("masked", "sdpa")
        assert row["status"] == ("ok" if timed else "unavailable"), row
        assert timed or row["detail"]
        if timed:
            tensors = {"out", "dq", "dk", "dv"} | ({"dscale"} if row["normalised"] else set())
            assert set(row["deviations"]) == tensors
            forward, backward = row["forward"], row["backward"]
            assert 0 < forward["p10_ms"] <= forward["median_ms"] <= forward["p90_ms"]
            assert backward["repeats"] >= 10
            assert forward["tflops"] == pytest.approx(row["gflop_forward"] / forward["median_ms"])
    by = {(r["pattern"], r["dtype"], r["normalised"], r["implementation"]): r for r in rows}
    ours, base = (by["diagonal", "bf16", True, name]["forward"] for name in ("sdpa", "masked"))
    assert ours["speedup_over_masked"] == pytest.approx(base["median_ms"] / ours["median_ms"])
    assert_drawn(tmp_path / "speed-diagonal-bf16-h2-normalised.png")
    assert len(list(tmp_path.glob("speed-*.png"))) == 8


def test_one_direction_and_a_table(tmp_path: Path) -> None:
    few = ("--pattern", "causal", "--normalise", "off", "--implementations", "sdpa,masked", "--out", tmp_path)
    result = hmar(*TINY, *few, "--forward")
    assert result.exit_code == 0, result.output
    title, header, *lines = result.stdout.splitlines()
    assert title.startswith("causal 1,2,3x4, L17, B2 H2 D16, fp32: ") and "backward" not in title + header
    assert [line.split()[0] for line in lines] == ["sdpa", "masked"]
    (row, _) = rows_of(tmp_path)
    assert "forward" in row and "backward" not in row and set(row["deviations"]) == {"out"}
    result = hmar(*TINY, *few, "--backward")
    (row, _) = rows_of(tmp_path)
    assert "backward" in row and "forward" not in row and "dv" in row["deviations"]


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is off by a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.factor, None


def spoil(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `sdpa` wrong in one way."""
    right = hmar_kernels.sdpa.attention

    def wrong(q: Any, k: Any, v: Any, lengths: Any, causal: bool, scale: float, head_scale: Any) -> Any:
        if how == "pattern":
            return right(q, k, v, lengths, not causal, scale, head_scale)
        if how == "a key":  # the last one of the sequence is not seen
            return right(
                q, k, v.index_fill(1, torch.tensor([v.shape[1] - 1]), 0), lengths, causal, scale, head_scale
            )
        if how == "dv":
            v = Scaled.apply(v, 1.01)
        if how == "dscale":
            head_scale = Scaled.apply(head_scale, 1.05)
        out, lse = right(q, k, v, lengths, causal, scale, head_scale)
        if how == "no number":
            middle = torch.zeros_like(out)
            middle[1, 3, 0] = float("nan")  # an image and head that are not compared
            out = out + middle
        if how == "images":  # one image's output also depends on the next one's values
            out = out + 1e-6 * v.roll(1, 0)
        return out, lse

    monkeypatch.setattr(hmar_kernels.sdpa, "attention", wrong)


@pytest.mark.parametrize("how", ["pattern", "a key", "dv", "dscale", "no number", "images"])
def test_a_wrong_implementation_gets_no_speed(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoil(how, monkeypatch)
    few = ("--normalise", "on", "--implementations", "masked,sdpa", "--pattern", "causal", "--out", tmp_path)
    result = hmar(*TINY, *few)
    assert result.exit_code == 1, result.output
    base, row = rows_of(tmp_path)
    assert base["status"] == "ok" and row["status"] == "wrong"
    assert "forward" not in row and "backward" not in row
    assert "times what rounding allows" in row["detail"]
    assert how not in ("dv", "dscale") or row["detail"].startswith(f"{how} is off by")
    line = next(line for line in result.stdout.splitlines() if line.startswith("sdpa"))
    assert line.split() == ["sdpa", "wrong"]
    assert f"sdpa wrong (causal 1,2,3x4, L17, B2 H2 D16, fp32, normalised): {row['detail']}" in result.stderr


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (torch.OutOfMemoryError("Tried to allocate 90 GiB.\nmore"), "out of memory", 0),
        (RuntimeError("no such kernel"), "failed", 1),
    ],
)
def test_one_that_breaks_is_a_row(
    error: Exception, status: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(hmar_kernels.masked, "attention", broken)
    result = hmar(*TINY, "--normalise", "off", "--implementations", "masked,sdpa", "--out", tmp_path)
    assert result.exit_code == code, result.output
    rows = rows_of(tmp_path)
    assert [row["status"] for row in rows] == [status, "ok"] * 2
    assert str(error).splitlines()[0] in rows[0]["detail"] and "more" not in rows[0]["detail"]
    assert rows[1]["forward"]["speedup_over_masked"] is None
    assert f"masked {status} (2 cases): " in result.stderr


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, calls = attention.time_calls, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(attention, "time_calls", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a shell's background
    try:
        result = hmar(*TINY, "--implementations", "masked,sdpa", "--out", tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130, result.output
    document = json.loads((tmp_path / "speed.json").read_text())
    assert not document["complete"] and [row["implementation"] for row in document["rows"]] == ["masked"]
    assert "interrupted" in result.stderr and "masked" in result.stdout
    assert_drawn(tmp_path / "speed-diagonal-fp32-h2.png")


def test_training_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = (
        "--train-step",
        "hmar-tiny",
        "--batch",
        "2",
        "--seconds",
        "0",
        "--device",
        "cpu",
        "--out",
        tmp_path,
    )
    result = hmar(*few, "--implementations", "masked,sdpa,varlen", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["train_step"]["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "unavailable"]
    assert rows[0]["batch"] == 2 and rows[0]["median_ms"] > 0 and rows[0]["length"] == 130
    assert_drawn(tmp_path / "train-step.png")
    spoil("pattern", monkeypatch)
    result = hmar(*few, "--implementations", "sdpa")
    assert result.exit_code == 1
    assert "sdpa wrong (hmar-tiny): out is off by" in result.stderr
    (row,) = json.loads((tmp_path / "train-step.json").read_text())["rows"]
    assert "median_ms" not in row


def test_tuning_says_what_is_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is in use; Ctrl-C keeps the shapes that were measured."""
    slow = {"rows": 64, "block": 32, "warps": 4, "stages": 3, "bulk": True, "inline": False, "registers": 128}
    fast = slow | {"rows": 128, "inline": True, "registers": 0}
    found = {"chosen": {"forward": slow, "keys": slow}}
    found |= {"forward": [{"ms": 0.25, **fast}, {"ms": 0.5, **slow}], "keys": []}
    answers = iter([found])

    def tune(*_: Any, **settings: Any) -> dict[str, Any]:
        assert settings["dtype"] == torch.bfloat16 and settings["normalized"]
        for answer in answers:
            return answer
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "hmar_kernels.triton_attention", SimpleNamespace(tune=tune))
    monkeypatch.setattr(run, "describe_device", lambda _: {"device": "a GPU"})
    monkeypatch.setattr(run, "reason_against", lambda *_: None)
    cases = base_grid("", torch.device("cuda")).cases()
    outcome = run.run_tuning(cases[:2], torch.device("cuda"), tmp_path)
    assert outcome.interrupted
    document = json.loads((tmp_path / "tune.json").read_text())
    assert not document["complete"] and document["rows"][0]["found"] == found
    (table,) = outcome.tables
    lines = [[list(column.cells)[i] for column in table.columns] for i in range(2)]
    head = ["diagonal", "256 px", "B16 H24 D64, bf16, normalised"]
    assert lines == [
        [*head, "forward", "0.5", "0.25", "128x32, 4 warps, 3 stages, bulk, inline"],
        [*head, "keys", "", "", "none compiles"],
    ]
    outcome = run.run_tuning(cases[:2], torch.device("cuda"), tmp_path)
    assert outcome.interrupted and outcome.tables[0].row_count == 0
    monkeypatch.setattr(run, "reason_against", lambda *_: "heads of 40")
    with pytest.raises(UserError, match="heads of 40"):
        run.run_tuning(cases, torch.device("cuda"), tmp_path)


def test_sequence_lengths(tmp_path: Path) -> None:
    result = hmar("--sequence-lengths", "--resolutions", "256,512", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)["sequence_lengths"]
    assert [row["next_scale"] for row in document["by_resolution"]] == [680, 2240, 9451]
    assert [row["next_token"] for row in document["by_resolution"]] == [256, 1024, 4096]
    steps = document["by_steps"]["256"]
    assert steps[0] == {"steps": 10, "extra": 0, "var": 680, "hmar": 680}
    assert steps[1]["var"] == 680 + 7 * 7  # the smallest side that was missing
    assert steps[-1] == {"steps": 16, "extra": 6, "var": sum(p * p for p in range(1, 17)), "hmar": 680}
    assert_drawn(tmp_path / "sequence-lengths.png")
    assert "1,496" in hmar("--sequence-lengths", "--out", tmp_path).stdout


def test_patterns(tmp_path: Path) -> None:
    result = hmar("--patterns", "--sides", "1,2", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["patterns"]["lists"]
    assert found["visible_pairs"] == {"causal": 1 + 4 * 5, "diagonal": 1 + 4 * 4}
    assert found["visible_share"]["diagonal"] == 17 / 25
    with Image.open(tmp_path / "patterns-1-2.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    coloured = (pixels.max(axis=2) - pixels.min(axis=2)) > 60
    left, right = np.split(coloured, 2, axis=1)
    assert left.sum() / right.sum() == pytest.approx(21 / 17, rel=0.05)


def test_presets() -> None:
    assert TIMED[0] == "masked" and {*TIMED, "reference"} == set(IMPLEMENTATIONS)
    cuda = torch.device("cuda")
    paper, h100 = base_grid("paper", cuda).cases(), base_grid("h100", cuda).cases()
    assert {(c.batch, c.head_size, c.dtype, c.normalised) for c in paper} == {(16, 64, "fp16", False)}
    assert {c.heads for c in paper} == {16, 20, 24, 30} and {c.scales.total for c in paper} == {
        680,
        2240,
        9451,
    }
    shapes = {(c.name, c.batch, c.heads, c.head_size, c.dtype) for c in h100}
    assert shapes == {(f"{p} px", b, 24, 64, "bf16") for p, b in ((256, 16), (512, 16), (1024, 4))}
    assert len(h100) == 12 and {c.normalised for c in base_grid("", cuda).cases()} == {True}
    small = base_grid("paper", torch.device("cpu")).cases()
    assert {(c.scales.total, c.batch, c.heads, c.dtype) for c in small} == {(680, 1, 2, "fp32")}


def test_mistakes_are_one_line_and_a_hint(tmp_path: Path) -> None:
    cases: dict[str, tuple[object, ...]] = {
        "'x' is no side": ("--sides", "1,x"),
        "'3x' is no side": ("--sides", "1,3x"),
        "expected scales that grow": ("--sides", "3,2"),
        "sides of at least 1": ("--sides", "0,2"),
        "'128' is unknown": ("--resolutions", "256,128"),
        "'fp8' is unknown": ("--dtypes", "fp8"),
        "'full' is unknown": ("--pattern", "full"),
        "'maybe' is unknown": ("--normalise", "maybe"),
        "'magic' is unknown": ("--implementations", "masked,magic"),
        "expected positive whole numbers": ("--heads", "0"),
        "--preset big: unknown": ("--preset", "big"),
        "--tune needs a GPU": ("--tune", "--device", "cpu"),
        "trains no next-scale model": ("--train-step", "mar-tiny"),
        "hmar-d17": ("--train-step", "hmar-d17"),
        "Invalid value for --batch": ("--batch", "-1"),
        "no use for --sides, --forward beside --train-step": (
            "--train-step",
            "hmar-tiny",
            "--sides",
            "1,2",
            "--forward",
        ),
        "no use for --heads beside --patterns and --sequence-lengths": (
            "--patterns",
            "--sequence-lengths",
            "--sides",
            "1,2",
            "--heads",
            "3",
        ),
        "no use for --compile or --no-compile without --train-step": ("--no-compile",),
    }
    for message, arguments in cases.items():
        result = hmar(*arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2, (arguments, result.output)
        first, hint = result.stderr.replace("'--batch'", "--batch").splitlines()
        assert first.startswith("error: ") and message in first, first
        assert hint.startswith("hint: ")
    assert not (tmp_path / "out").exists()


def test_help_names_every_flag() -> None:
    result = CliRunner().invoke(app, ["bench-attention", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    for flag in (
        "--preset",
        "--train-step",
        "--sequence-lengths",
        "--patterns",
        "--tune",
        "--sides",
        "--json",
    ):
        assert flag in result.stdout


def test_tritons_kernels_pass_in_the_interpreter(tmp_path: Path) -> None:
    flags = "--sides 1,2 --batch 1 --heads 1 --head-size 32 --seconds 0 --device cpu --implementations triton"
    more = ("--normalise", "on", "--pattern", "causal", "--out", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "hmar_cli", "bench-attention", *flags.split(), *more],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path)
    assert row["status"] == "ok" and set(row["deviations"]) == {"out", "dq", "dk", "dv", "dscale"}

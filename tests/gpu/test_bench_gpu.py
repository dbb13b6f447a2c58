"""`hmar bench-attention` on a GPU: its clock, its memory and a run; skipped without one."""

import json
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.benchmarks.timing import peak_memory, time_calls

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_calls_of_a_turn_are_timed_apart_by_the_gpu() -> None:
    short, long = time_calls(
        lambda _: [lambda: torch.cuda._sleep(200_000), lambda: torch.cuda._sleep(2_000_000)],
        torch.device("cuda"),
        0.0,
    )
    assert long.p10 / short.p10 == pytest.approx(10, rel=0.2)


def test_the_host_is_not_measured_unless_asked_for() -> None:
    def slow_to_issue() -> None:
        time.sleep(2e-3)
        torch.cuda._sleep(1000)

    device = torch.device("cuda")
    (gpu,) = time_calls(lambda _: [slow_to_issue], device, 0.0)
    (whole,) = time_calls(lambda _: [slow_to_issue], device, 0.0, ahead=False)
    assert gpu.median < 0.5 and whole.median > 1.8 and gpu.host > 1.8


def test_peak_memory_counts_what_is_held_and_what_was() -> None:
    def call() -> torch.Tensor:
        scratch = torch.ones(3 * 2**20, dtype=torch.uint8, device="cuda")
        kept = torch.ones(2**20, dtype=torch.uint8, device="cuda")
        return kept + scratch[0]

    assert peak_memory(call, torch.device("cuda")) == pytest.approx(5 * 2**20, abs=4096)


def test_a_run(tmp_path: Path) -> None:
    arguments = (
        "bench-attention --resolutions 256 --batch 2 --heads 4 --seconds 0.05 --normalise on,off "
        f"--implementations masked,triton,sdpa --out {tmp_path} --json"
    )
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["speed"]["rows"]
    assert len(rows) == 12 and {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert row["peak_bytes"] > 0.9 * row["least_bytes"] and row["forward"]["tflops"] > 0
    assert len(list(tmp_path.glob("*.png"))) == 4

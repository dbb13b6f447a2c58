"""The speed of attention over scales: every implementation is compared with the reference, then timed.

Letters: B batch, L tokens, H heads, D head size.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hmar_cli.benchmarks.cases import Case
from hmar_cli.benchmarks.correctness import DTYPES, Finding, Judge, attend, draw_inputs, reason_against
from hmar_cli.benchmarks.timing import Timing, peak_memory, time_calls
from hmar_cli.errors import first_line

BASELINE = "masked"
"""What speeds are compared with: one call with a dense mask, as in HMAR's Fig. 11."""
CACHE_BYTES = 64 * 2**20
"""Taken for a GPU's L2 cache where PyTorch doesn't tell."""
MOST_INPUTS = 64


@dataclass(kw_only=True)
class Row:
    """What came of one implementation at one case.

    Attributes:
        case: the shape.
        implementation: its name.
        status: "ok", "wrong", "unavailable", "out of memory" or "failed"; only "ok" has times.
        detail: why, in one line.
        findings: its deviations from the reference.
        times: by "forward" and "backward".
        peak_bytes: of inputs, outputs, gradients and all that is held in between; None where it isn't known.
        least_bytes: of inputs, outputs, gradients and two float32 numbers per row and head.
    """

    case: Case
    implementation: str
    status: str = "ok"
    detail: str = ""
    findings: list[Finding] = field(default_factory=list)
    times: dict[str, Timing] = field(default_factory=dict)
    peak_bytes: int | None = None
    least_bytes: int = 0

    def tflops(self, direction: str) -> float:
        """Useful TFLOP/s of "forward" or "backward"."""
        return self.case.flop(direction) / self.times[direction].median / 1e9

    def speedup(self, direction: str, rows: Sequence["Row"]) -> float | None:
        """How many times as fast as `BASELINE` at the same case; None where one of them has no time."""
        base = next((r for r in rows if r.case == self.case and r.implementation == BASELINE), None)
        if base is None or direction not in base.times or direction not in self.times:
            return None
        return base.times[direction].median / self.times[direction].median

    def describe(self, rows: Sequence["Row"]) -> dict[str, Any]:
        """The row as JSON; `rows` holds the baseline."""
        measured = {
            direction: {
                **{f"{key}_ms" if key != "repeats" else key: value for key, value in asdict(timing).items()},
                "tflops": self.tflops(direction),
                f"speedup_over_{BASELINE}": self.speedup(direction, rows),
            }
            for direction, timing in self.times.items()
        }
        return {
            **self.case.describe(),
            "implementation": self.implementation,
            "status": self.status,
            "detail": self.detail,
            "deviations": {f.tensor: _finite(asdict(f)) for f in self.findings},
            **measured,
            "peak_bytes": self.peak_bytes,
            "least_bytes": self.least_bytes,
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON has no word for as text."""
    return {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}


def measure(
    cases: Sequence[Case],
    implementations: Sequence[str],
    *,
    device: torch.device,
    directions: Sequence[str],
    seconds: float,
    seed: int,
) -> Iterator[Row]:
    """Check and time every implementation at every case, in this order.

    Args:
        cases: the shapes.
        implementations: names of `hmar_kernels.IMPLEMENTATIONS`.
        device: where.
        directions: "forward", "backward" or both.
        seconds: about how long to time each.
        seed: of all random numbers.

    Yields:
        A row as soon as it is measured; an implementation that is wrong, doesn't fit into memory or fails has one,
        too.
    """
    for case in cases:
        judge: Judge | None = None
        for name in implementations:
            row = Row(case=case, implementation=name, least_bytes=_least_bytes(case, directions))
            if reason := reason_against(case, name, device):
                row.status, row.detail = "unavailable", reason
                yield row
                continue
            try:
                judge = judge or Judge(case, device, seed, "backward" in directions)
                _check_and_time(row, judge, device, directions, seconds, seed)
            except Exception as error:  # whatever one of them does, the others are measured
                row.status, row.detail = failure(error)
            tidy(device)
            yield row
        del judge
        tidy(device)


def failure(error: Exception) -> tuple[str, str]:
    """Status and detail of a row that could not be measured."""
    line = first_line(error)[:200]
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory", line
    return "failed", f"{type(error).__name__}: {line}"


def tidy(device: torch.device) -> None:
    """Give unused memory back, so that one implementation's doesn't stand in another's way."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check_and_time(
    row: Row, judge: Judge, device: torch.device, directions: Sequence[str], seconds: float, seed: int
) -> None:
    """Fill in a row; one that is wrong gets no times."""
    case, name = row.case, row.implementation
    row.findings = judge.check(lambda qkv, head_scale: attend(case, name, qkv, head_scale))
    wrong = [finding for finding in row.findings if not finding.share <= 1]
    if wrong:
        row.status, row.detail = "wrong", "; ".join(map(say, wrong))
        return
    work = Work(case, name, device, seed, "backward" in directions)
    bytes_held = peak_memory(work.once, device)
    row.peak_bytes = None if bytes_held is None else bytes_held + work.input_bytes
    timings = dict(
        zip(("forward", "backward"), time_calls(work.turn, device, seconds), strict=False)
    )  # no backward where none was asked for
    row.times = {direction: timings[direction] for direction in directions}


def say(finding: Finding) -> str:
    """A deviation in words."""
    return (
        f"{finding.tensor} is off by {finding.error:.2g} of its size, {finding.share:.3g} times what rounding allows "
        f"({finding.where})"
    )


def _least_bytes(case: Case, directions: Sequence[str]) -> int:
    """Bytes of inputs and outputs, of their gradients with a backward pass, and of two float32 rows per head."""
    rows = case.batch * case.scales.total * case.heads
    passes = 2 if "backward" in directions else 1
    return rows * (passes * 4 * case.head_size * DTYPES[case.dtype].itemsize + 2 * 4)


class Work:
    """An implementation on inputs that take turns, so that none is in the cache when it is read.

    Args:
        case: the shape.
        implementation: its name.
        device: where.
        seed: of the inputs.
        backward: prepare the backward pass, too.
    """

    def __init__(
        self, case: Case, implementation: str, device: torch.device, seed: int, backward: bool
    ) -> None:
        self.case, self.implementation, self.backward = case, implementation, backward
        generator = torch.Generator(device).manual_seed(seed)
        tokens = case.batch * case.scales.total * case.heads * case.head_size
        one = 3 * tokens * DTYPES[case.dtype].itemsize
        cache = CACHE_BYTES
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or CACHE_BYTES
        count = min(max(math.ceil(2 * cache / one), 2), MOST_INPUTS) if device.type == "cuda" else 2
        self.inputs: list[tuple[Tensor, Tensor | None]] = []
        self.grads: list[Tensor] = []
        for _ in range(count):
            qkv, head_scale, grad = draw_inputs(case, device, generator)
            for leaf in (qkv, head_scale):
                if leaf is not None:
                    leaf.requires_grad_(backward)
            self.inputs.append((qkv, head_scale))
            self.grads.append(grad)
        self.outputs: list[Tensor | None] = [None] * count
        self.input_bytes = one + (grad.nbytes if backward else 0)

    def forward(self, place: int) -> Tensor:
        """Run forward on inputs of a place, and keep the output for the backward pass."""
        with torch.set_grad_enabled(self.backward):
            out = attend(self.case, self.implementation, *self.inputs[place])
        self.outputs[place] = out if self.backward else None
        return out

    def gradients(self, place: int) -> tuple[Tensor, ...]:
        """Run backward from the output of a place, and drop it."""
        out, leaves = self.outputs[place], [x for x in self.inputs[place] if x is not None]
        assert out is not None
        self.outputs[place] = None
        return torch.autograd.grad(out, leaves, self.grads[place])

    def once(self) -> object:
        """Forward and backward, all results held."""
        out = self.forward(0)
        return out, self.gradients(0) if self.backward else None

    def turn(self, i: int) -> list[Any]:
        """Calls of turn i: a forward pass and, from the output that has lain for longest, a backward pass."""
        count = len(self.inputs)
        new, old = i % count, (i + 1) % count
        if not self.backward:
            return [lambda: self.forward(new)]
        if self.outputs[old] is None:  # at the beginning
            self.forward(old)
        return [lambda: self.forward(new), lambda: self.gradients(old)]

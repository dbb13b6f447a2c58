"""The FLOP model against counting, and the budgets of rounding errors against real roundings."""

import math

import pytest
import torch
from hmar_kernels import scale_attention
from torch import Tensor

from hmar_cli.benchmarks.attention import Row
from hmar_cli.benchmarks.cases import H100, Case, visible_pairs
from hmar_cli.benchmarks.correctness import DTYPES, Judge, attend, draw_inputs, softmax_scale
from hmar_cli.benchmarks.timing import Timing, time_calls
from hmar_cli.models.scales import Scales

CPU = torch.device("cpu")


def make(
    pattern: str, dtype: str = "fp32", normalised: bool = False, sides: object = (1, 2, (3, 4), 6)
) -> Case:
    return Case(
        name="own", scales=Scales.of(sides), pattern=pattern, dtype=dtype, batch=2, heads=3, head_size=16,
        normalised=normalised,
    )  # fmt: skip


@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
@pytest.mark.parametrize("sides", [(1,), (1, 2, 3), (2, (2, 3), (3, 4)), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)])
def test_flop_model_counts_visible_pairs(pattern: str, sides: object) -> None:
    case = make(pattern, sides=sides)
    scale = [k for k, n in enumerate(case.scales.lengths) for _ in range(n)]
    seen = sum((j <= i) if pattern == "causal" else (j == i) for i in scale for j in scale)
    assert visible_pairs(case.scales.lengths, pattern == "causal") == seen
    assert case.flop("forward") == 4 * 16 * seen * 2 * 3
    assert case.flop("backward") == 2.5 * case.flop("forward")


def test_flop_model_gives_the_published_work() -> None:
    """Useful GFLOP forward of the shapes that were measured on an H100."""
    work = {(c.pattern, c.scales.total): c.flop("forward") / 1e9 for c in H100.cases()}
    expected = {680: (10.9, 28.2), 2240: (149.6, 321), 9451: (604, 1400)}
    for total, (diagonal, causal) in expected.items():
        assert work["diagonal", total] == pytest.approx(diagonal, rel=5e-3)
        assert work["causal", total] == pytest.approx(causal, rel=5e-3)


def test_rates_of_a_row() -> None:
    row = Row(case=make("causal"), implementation="sdpa", times={"forward": Timing(2.0, 1.0, 3.0, 10, 0.1)})
    assert row.tflops("forward") == row.case.flop("forward") / 2e-3 / 1e12


def by_heart(case: Case, qkv: Tensor, head_scale: Tensor | None) -> Tensor:
    """Attention whose every intermediate number is kept in the dtype: the roughest that may pass."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    if head_scale is not None:
        q = (torch.nn.functional.normalize(q.float(), dim=-1) * head_scale[:, None, None]).to(q.dtype)
        k = torch.nn.functional.normalize(k.float(), dim=-1).to(k.dtype)
    outputs, start = [], 0
    for length in case.scales.lengths:
        stop = start + length
        keys = slice(0 if case.pattern == "causal" else start, stop)
        scores = softmax_scale(case) * (q[:, :, start:stop].float() @ k[:, :, keys].float().mT)
        weights = scores.softmax(-1).to(v.dtype)
        outputs.append((weights.float() @ v[:, :, keys].float()).to(v.dtype))
        start = stop
    return torch.cat(outputs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_rounding_passes(dtype: str, normalised: bool, pattern: str) -> None:
    case = make(pattern, dtype, normalised)
    for seed in range(5):
        judge = Judge(case, CPU, seed)
        for name in ("reference", "sdpa", "masked"):
            for finding in judge.check(lambda qkv, scale, name=name: attend(case, name, qkv, scale)):  # type: ignore[misc]
                assert finding.share < 1, (seed, name, finding)
        for finding in judge.check(lambda qkv, scale: by_heart(case, qkv, scale)):
            assert finding.share < 1, (seed, finding)


@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_a_key_too_few_in_576_is_wrong(pattern: str, dtype: str) -> None:
    case = make(pattern, dtype, sides=(4, 24))

    def run(qkv: Tensor, scale: Tensor | None) -> Tensor:
        half = torch.ones(qkv.shape[1], dtype=qkv.dtype)
        half[-1] = 0.5
        parts = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2] * half[:, None, None]
        return scale_attention(
            parts, case.scales.grids, pattern, softmax_scale=softmax_scale(case), implementation="sdpa"  # type: ignore[arg-type]
        )  # fmt: skip

    shares = {finding.tensor: finding.share for finding in Judge(case, CPU, 0).check(run)}
    assert shares["out"] > 1 and shares["dv"] > 1


def test_a_nan_is_wrong() -> None:
    case = make("causal")
    judge = Judge(case, CPU, 0, gradients=False)
    (finding,) = judge.check(lambda qkv, scale: torch.full_like(qkv[:, :, 0], math.nan))
    assert finding.tensor == "out" and not finding.share <= 1


def test_inputs_follow_the_seed() -> None:
    case = make("causal", "bf16", True)
    first, again, other = (draw_inputs(case, CPU, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(
        torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None and b is not None
    )
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (2, case.scales.total, 3, 3, 16) and first[1] is not None and first[1].min() >= 2


def test_calls_of_a_turn_are_timed_apart() -> None:
    turns: list[int] = []

    def spin(n: int) -> None:
        sum(range(n))

    def turn(i: int) -> list[object]:
        turns.append(i)
        return [lambda: spin(1000), lambda: spin(100_000)]

    short, long = time_calls(turn, CPU, 0.0)  # type: ignore[arg-type]
    assert turns == list(range(len(turns))) and short.repeats == long.repeats == 10
    assert long.median > 5 * short.median and short.p10 <= short.median <= short.p90
    (endless,) = time_calls(lambda _: [lambda: None], CPU, float("inf"))
    assert endless.repeats == 200

"""Triton's kernels in every way of working that a table may choose, in the interpreter: tiles of 16 rows, so that
small inputs have several. `test_scale_attention` judges the operation with the settings that it chooses itself."""

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from hmar_kernels import unavailable
from judging import bounds_of, compare, inputs, lengths_of
from torch import Tensor

if reason := unavailable(
    "triton", device=torch.device("cpu"), dtype=torch.float32, head_size=32, pattern="causal"
):
    pytest.skip(f"compiled here, tests/gpu has its tests: {reason}", allow_module_level=True)

from hmar_kernels import triton_attention
from hmar_kernels.triton_attention import Setting, Settings

PLAIN = Setting(16, 16)
WAYS = {
    "pointers": PLAIN,
    "descriptors": dataclasses.replace(PLAIN, bulk=True, bulk_rows=True),
    "descriptors of blocks": dataclasses.replace(PLAIN, bulk=True, bulk_own=False),
    "one loop": dataclasses.replace(PLAIN, peel=False),
    "norms inside": dataclasses.replace(PLAIN, inline=True, bounded=True),
    "wide blocks": Setting(16, 32),
    "tall tiles": Setting(32, 16, bulk=True),
}
SIDES = (1, 2, 3, (2, 9), 5)


def judge(
    setting: Setting,
    one_pass: bool,
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    head_scale: Tensor | None,
    sides: tuple,
    pattern: str,
    softmax_scale: float = 0.3,
) -> None:
    """Run the kernels with a setting, all outputs filled with NaN at first, and compare with the bounds."""
    parts = qkv.unbind(2) if isinstance(qkv, Tensor) else qkv
    rest = (lengths_of(sides), pattern == "causal", softmax_scale, head_scale)
    settings = Settings(setting, setting, None if one_pass else setting)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        out, lse = triton_attention.forward(parts, *rest, settings)
        gradients = [torch.empty_like(x) for x in parts]
        assert gradients[0].isnan().all()
        d_scale = triton_attention.backward(grad, parts, out, lse, gradients, *rest, settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not lse[:, :, out.shape[1] :].any()
    found = {
        "out": out,
        "lse": lse[:, :, : out.shape[1]],
        **dict(zip(("dq", "dk", "dv"), gradients, strict=True)),
    }
    found |= {} if head_scale is None else {"dscale": d_scale}
    compare("triton", found, bounds_of(qkv, grad, head_scale, sides, pattern, softmax_scale))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_ways(way: str, one_pass: bool, pattern: str) -> None:
    qkv, grad, scale = inputs(SIDES, heads=1)
    judge(WAYS[way], one_pass, qkv, grad, scale, SIDES, pattern)
    judge(WAYS[way], one_pass, qkv[:1], grad[:1], None, SIDES, pattern)


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
def test_head_scales_on_both_sides_of_the_bound(one_pass: bool) -> None:
    """Up to about 41 the temperature stands for the maximum of scores, beyond it a running one does."""
    sides = (1, 3, 4)
    qkv, grad, _ = inputs(sides, 1, 4)
    scale = torch.tensor([41.0, 42.0, -90.0, 1e-3])
    for setting in (PLAIN, dataclasses.replace(PLAIN, bounded=True)):
        judge(setting, one_pass, qkv, grad, scale, sides, "causal", 1.0)


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
def test_a_head_scale_of_zero(one_pass: bool) -> None:
    """All keys count the same, and the scale has a gradient."""
    sides = (1, 3, 4)
    qkv, grad, _ = inputs(sides)
    judge(PLAIN, one_pass, qkv, grad, torch.tensor([0.0, 2.0]), sides, "diagonal")


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize("way", ["pointers", "descriptors"])
def test_heads_that_fill_their_block_in_part(one_pass: bool, way: str) -> None:
    """Heads of 96 are computed as 128."""
    sides = (2, 5)
    judge(WAYS[way], one_pass, *inputs(sides, 1, 2, 96), sides, "causal")


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_queries_of_the_last_scales(one_pass: bool, pattern: str) -> None:
    sides = (3, 2, 5)
    qkv, grad, scale = inputs(sides)
    q, k, v = qkv.unbind(2)
    judge(WAYS["descriptors"], one_pass, (q[:, -25:], k, v), grad[:, -25:], scale, sides, pattern)


def test_sums_are_shared_by_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads take turns at the sums of two, which each leaves at zero."""
    monkeypatch.setattr(triton_attention, "_slots", lambda *_: 2)
    sides = (1, 3, 5)
    judge(PLAIN, True, *inputs(sides), sides, "causal")


def test_negative_softmax_scale_without_normalisation() -> None:
    sides = (1, 3)
    qkv, *_ = inputs(sides)
    out, lse = triton_attention.forward(qkv.unbind(2), lengths_of(sides), True, -0.5, None)
    q, k, v = qkv.unbind(2)
    turned, same = triton_attention.forward((-q, k, v), lengths_of(sides), True, 0.5, None)
    assert torch.equal(out, turned) and torch.equal(lse, same)


@pytest.mark.parametrize("normalized", [True, False])
def test_tuning_ranks_what_it_measured(monkeypatch: pytest.MonkeyPatch, normalized: bool) -> None:
    """Every kind of kernel runs; settings that the chip has no room for are left out."""
    times = {PLAIN: 2.0, Setting(32, 16): 1.0, Setting(64, 64): 0.0}

    def measured(run: Callable[[Setting], None], setting: Setting) -> float:
        if times[setting]:
            run(setting)
        return times[setting]

    monkeypatch.setattr(triton_attention, "candidates", lambda *_: list(times))
    monkeypatch.setattr(triton_attention, "_milliseconds", measured)
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    found = triton_attention.tune(
        (1, 4), True, batch=1, heads=1, head_size=32, normalized=normalized, **place
    )
    assert json.loads(json.dumps(found)) == found
    for kind in ("forward", "queries", "keys", "fused"):
        assert [(entry["ms"], entry["rows"]) for entry in found[kind]] == [(1.0, 32), (2.0, 16)]
    assert found["one_pass"] and set(found["chosen"]) == {"forward", "keys", "queries"}


@pytest.mark.parametrize("kind", ["forward", "queries", "keys", "fused"])
@pytest.mark.parametrize("size", [64, 128])
def test_candidates_differ(kind: str, size: int) -> None:
    found = triton_attention.candidates(kind, size, True)
    assert len(set(found)) == len(found) > 3

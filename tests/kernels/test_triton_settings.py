"""Triton's kernels in every way of working that a table may choose, in the interpreter: tiles of 16 rows, so that
small inputs have several. `test_scale_attention` judges the operation with the settings that it chooses itself."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hmar_kernels import unavailable
from judging import bounds_of, compare, inputs, lengths_of
from torch import Tensor

if reason := unavailable(
    "triton", device=torch.device("cpu"), dtype=torch.float32, head_size=32, pattern="causal"
):
    pytest.skip(f"compiled here, tests/gpu has its tests: {reason}", allow_module_level=True)

from hmar_kernels import triton_attention, triton_forward
from hmar_kernels.tiles import cut, query_spans
from hmar_kernels.triton_attention import Setting, Settings

PLAIN = Setting(16, 16)
WAYS = {
    "pointers": PLAIN,
    "descriptors": dataclasses.replace(PLAIN, bulk=True),
    "norms inside": dataclasses.replace(PLAIN, inline=True),
    "wide blocks": Setting(16, 32),
    "tall tiles": Setting(32, 16, bulk=True),
}
SIDES = (1, 2, 3, (2, 9), 5)


def judge(
    setting: Setting,
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
    settings = Settings(setting, setting, setting)
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
@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_ways(way: str, pattern: str) -> None:
    qkv, grad, scale = inputs(SIDES, heads=1)
    judge(WAYS[way], qkv, grad, scale, SIDES, pattern)
    judge(WAYS[way], qkv[:1], grad[:1], None, SIDES, pattern)


def test_a_kernel_that_cannot_be_compiled_with_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads by pointers, the others as before."""
    monkeypatch.setattr(triton_attention, "POINTERS_ALONE", ("queries",))
    triton_attention._launch.cache_clear()
    qkv, grad, scale = inputs(SIDES, heads=1)
    judge(WAYS["descriptors"], qkv, grad, scale, SIDES, "diagonal")
    q, k, v = qkv.unbind(2)
    call = triton_attention._Call((q, k, v, grad), lengths_of(SIDES), False, 0.3, scale)
    launches = {kind: call.launch(kind, WAYS["descriptors"]) for kind in ("queries", "keys")}
    assert not launches["queries"].descriptors and launches["keys"].descriptors
    limited = call.launch("queries", dataclasses.replace(WAYS["descriptors"], registers=64))
    assert limited.constants["maxnreg"] is None, "the limit is that of the kernel with descriptors"
    triton_attention._launch.cache_clear()


@pytest.mark.parametrize("scales", [(42.0, 100.0, -90.0, 1e-3), (1000.0, -1000.0, 1e-6, -5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("way", ["pointers", "norms inside"])
def test_head_scales_of_any_size(way: str, dtype: torch.dtype, scales: tuple[float, ...]) -> None:
    """In float16 there is no bound on the scores, but a running maximum throughout."""
    sides = (1, 3, 4)
    qkv, grad, _ = inputs(sides, 1, 4, dtype=dtype)
    judge(WAYS[way], qkv, grad, torch.tensor(scales), sides, "causal", 1.0)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_a_maximum_that_comes_late(pattern: str, normalized: bool) -> None:
    """The last block holds scores e^100 times those before it: sums relative to an early maximum overflow."""
    sides = (3, 8)
    qkv, grad, _ = inputs(sides, 1, 1)
    q, k, _ = qkv.unbind(2)
    q.copy_(torch.nn.functional.normalize(q.abs(), dim=-1))
    k.copy_(-q)
    k[:, -20:] *= -1
    scale = torch.tensor([90.0]) if normalized else None
    judge(PLAIN, qkv, grad, scale, sides, pattern, 1.0 if normalized else 90.0)


def test_a_head_scale_of_zero() -> None:
    """All keys count the same, and the scale has a gradient."""
    sides = (1, 3, 4)
    qkv, grad, _ = inputs(sides)
    judge(PLAIN, qkv, grad, torch.tensor([0.0, 2.0]), sides, "diagonal")


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An entry for every tile that is computed once more, with a running maximum, as its kernel runs."""
    found: list[bool] = []
    attend = triton_forward._attend

    def noted(*args: Any) -> Any:
        given = dict(zip(attend.arg_names, args, strict=True))
        found.extend([True] * (not given["STEADY"]))
        return attend(*args)

    monkeypatch.setattr(triton_forward, "_attend", noted)
    return found


def tiles(sides: tuple, setting: Setting, causal: bool) -> int:
    """How many there are for one head."""
    lengths = lengths_of(sides)
    return len(cut(query_spans(lengths, sum(lengths), causal), setting.rows, setting.block))


@pytest.mark.parametrize("way", ["pointers", "norms inside", "wide blocks", "tall tiles"])
@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_scores_far_below_their_bound(way: str, pattern: str, again: list[bool]) -> None:
    """Every key lies opposite: relative to the bound the weights vanish, and all tiles are computed again."""
    qkv, grad, _ = inputs(SIDES, 1, 1)
    q, k, _ = qkv.unbind(2)
    q.copy_(torch.nn.functional.normalize(q.abs(), dim=-1))
    k.copy_(-q)
    for scale, expected in ((44.0, 0), (110.0, tiles(SIDES, WAYS[way], pattern == "causal"))):
        again.clear()
        judge(WAYS[way], qkv, grad, torch.tensor([scale]), SIDES, pattern, 1.0)
        assert len(again) == expected


def test_one_row_of_a_tile_far_below_its_bound(again: list[bool]) -> None:
    """Its tile alone is computed again; the rows beside it have weights near the bound."""
    sides = (4, 8)
    qkv, grad, _ = inputs(sides, 1, 1)
    q, k, _ = qkv.unbind(2)
    q.copy_(torch.nn.functional.normalize(q.abs(), dim=-1))
    k.copy_(q)
    for sign, expected in ((1, 0), (-1, 1)):
        q[:, 30] *= sign
        judge(PLAIN, qkv, grad, torch.tensor([110.0]), sides, "diagonal", 1.0)
        assert len(again) == expected


def test_queries_with_one_key_each(again: list[bool]) -> None:
    """The key has all the weight, wherever its score lies below the bound."""
    sides = (1,) * 7
    qkv, grad, _ = inputs(sides, 2, 2)
    judge(PLAIN, qkv, grad, torch.tensor([300.0, -300.0]), sides, "diagonal", 1.0)
    assert again


@pytest.mark.parametrize("scale", [30.0, 150.0, 1000.0])
def test_rows_of_length_zero_under_large_head_scales(scale: float, again: list[bool]) -> None:
    """Their scores are 0, far below the bound of a large scale."""
    sides = (1, 2, 3)
    qkv, grad, _ = inputs(sides, 1, 1)
    qkv[:, 2:6, 0] = 0
    qkv[:, 3, 1] = 0
    qkv[:, 8:, 1] = 0
    judge(PLAIN, qkv, grad, torch.tensor([scale]), sides, "diagonal", 1.0)
    assert bool(again) == (scale > 100)


@pytest.mark.parametrize("way", ["pointers", "descriptors"])
def test_heads_that_fill_their_block_in_part(way: str) -> None:
    """Heads of 96 are computed as 128."""
    sides = (2, 5)
    judge(WAYS[way], *inputs(sides, 1, 2, 96), sides, "causal")


@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_queries_of_the_last_scales(pattern: str) -> None:
    sides = (3, 2, 5)
    qkv, grad, scale = inputs(sides)
    q, k, v = qkv.unbind(2)
    judge(WAYS["descriptors"], (q[:, -25:], k, v), grad[:, -25:], scale, sides, pattern)


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
    for kind in ("forward", "queries", "keys"):
        assert [(entry["ms"], entry["rows"]) for entry in found[kind]] == [(1.0, 32), (2.0, 16)]
    assert set(found["chosen"]) == {"forward", "queries", "keys"}


@pytest.mark.parametrize("kind", ["forward", "queries", "keys"])
@pytest.mark.parametrize("size", [64, 128])
def test_candidates_differ(kind: str, size: int) -> None:
    found = triton_attention.candidates(kind, size, True)
    assert len(set(found)) == len(found) > 3

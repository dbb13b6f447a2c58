"""Triton's kernels on a GPU: every way of working that a table may choose, repetition under load, memory, graphs."""

import dataclasses

import pytest
import torch
from hmar_kernels import scale_attention
from judging import bounds_of, compare, inputs, lengths_of
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
triton_attention = pytest.importorskip("hmar_kernels.triton_attention")
Setting, Settings = triton_attention.Setting, triton_attention.Settings

DEVICE = torch.device("cuda", 0)
PATTERNS = ["causal", "diagonal"]
SIDES = (1, 2, (1, 3), (2, 9), 13, (3, 47), 9)
"""Scales that begin anywhere, so that no column number lies at 16 bytes by chance."""
PAPER = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

WAYS = {
    "pointers": Setting(64, 64, 4, 2),
    "pointers, one stage": Setting(64, 64, 4, 1),
    "descriptors": Setting(64, 64, 4, 2, bulk=True),
    "three stages": Setting(64, 64, 4, 3, bulk=True),
    "four stages": Setting(64, 64, 4, 4, bulk=True),
    "wide": Setting(128, 64, 8, 2, bulk=True),
    "wide, three stages": Setting(128, 64, 8, 3, bulk=True),
    "narrow": Setting(64, 32, 4, 3, bulk=True),
    "norms inside": Setting(64, 64, 4, 3, bulk=True, inline=True),
    "narrow, norms inside": Setting(64, 32, 4, 3, bulk=True, inline=True),
}


def run(settings: Settings, qkv: Tensor, grad: Tensor, rest: tuple) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients of one setting; all memory holds NaN at first."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is filled with NaN
    try:
        out, lse = triton_attention.forward(qkv.unbind(2), *rest, settings)
        gradients = torch.empty_like(qkv).unbind(2)
        d_scale = triton_attention.backward(grad, qkv.unbind(2), out, lse, gradients, *rest, settings)
    finally:
        torch.use_deterministic_algorithms(False)
    found = {
        "out": out,
        "lse": lse[:, :, : out.shape[1]],
        **dict(zip(("dq", "dk", "dv"), gradients, strict=True)),
    }
    return found | ({} if rest[3] is None else {"dscale": d_scale})


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("way", WAYS)
def test_ways(way: str, pattern: str, dtype: torch.dtype, normalized: bool) -> None:
    qkv, grad, scale = inputs(SIDES, heads=3, size=64, dtype=dtype, device=str(DEVICE))
    scale = scale if normalized else None
    settings = Settings(*[WAYS[way]] * 3)
    found = run(settings, qkv, grad, (lengths_of(SIDES), pattern == "causal", 0.3, scale))
    compare("triton", found, bounds_of(qkv, grad, scale, SIDES, pattern, 0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("normalized", [True, False])
def test_a_maximum_that_comes_late(normalized: bool, pattern: str, dtype: torch.dtype) -> None:
    """The last keys have scores e^100 times those before them: sums relative to an early maximum overflow."""
    sides = (3, 16)
    qkv, grad, _ = inputs(sides, heads=4, size=64, dtype=dtype, device=str(DEVICE))
    q, k, _ = qkv.unbind(2)
    q.copy_(torch.nn.functional.normalize(q.abs().float(), dim=-1))
    k.copy_(-q)
    k[:, -40:] *= -1
    scale = torch.tensor([3.0, 90.0, -90.0, 100.0], device=DEVICE) if normalized else None
    softmax_scale = 1.0 if normalized else 90.0
    rest = (lengths_of(sides), pattern == "causal", softmax_scale, scale)
    found = run(triton_attention.settings_for(*rest[:2], 64, dtype, normalized), qkv, grad, rest)
    compare("triton", found, bounds_of(qkv, grad, scale, sides, pattern, softmax_scale))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("way", [*WAYS, "default"])
def test_results_do_not_depend_on_load(way: str, pattern: str, normalized: bool) -> None:
    """Images get, bit for bit, what they get alone, whatever else the chip works on and its memory waits for."""
    images, heads = 96, 24
    qkv, grad, _ = inputs(PAPER, images, heads, 64, torch.bfloat16, str(DEVICE))
    scale = torch.full((heads,), 5.0, device=DEVICE) if normalized else None
    rest = (lengths_of(PAPER), pattern == "causal", 0.5, scale)
    chosen = triton_attention.settings_for(*rest[:2], 64, torch.bfloat16, normalized)
    settings = chosen if way == "default" else Settings(*[WAYS[way]] * 3)
    found = run(settings, qkv, grad, rest)
    for image in (0, 47, 95):
        at = slice(image, image + 1)
        alone = run(settings, qkv[at].clone(), grad[at].clone(), rest)
        for key in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(found[key][at], alone[key]), f"{key} of image {image}"


CONSTANT = 2**20
"""Bytes beside: parts of the head scale's gradient."""


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("batch", [4, 16])
def test_memory(batch: int, normalized: bool) -> None:
    """At most inputs, outputs (the log-sum-exp is one), gradients and two float32 numbers per token and head."""
    heads, total = 24, sum(lengths_of(PAPER))
    qkv, grad, _ = inputs(PAPER, batch, heads, 64, torch.bfloat16, str(DEVICE))
    qkv.requires_grad_()
    scale = torch.full((heads,), 5.0, device=DEVICE, requires_grad=True) if normalized else None
    given = [qkv] if scale is None else [qkv, scale]

    def once() -> list[Tensor]:
        out = scale_attention(qkv, PAPER, "diagonal", head_scale=scale, implementation="triton")
        return [out, *torch.autograd.grad(out, given, grad)]

    once()  # compiles, and makes the tables
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    results = once()
    torch.cuda.synchronize()
    took = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    rows = 4 * batch * heads * total
    assert took <= sum(x.nbytes for x in results) + rows + 2 * rows + CONSTANT


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_graph_of_scales_never_seen_before(pattern: str) -> None:
    """Kernels are compiled, tables are not there yet: recording makes them, and replays read them."""
    qkv, _, scale = inputs((1, 2, 11), 2, 4, 64, torch.bfloat16, str(DEVICE))
    for sides in ((1, 2, 11), (11, 1, 2)):
        scale_attention(qkv, sides, pattern, head_scale=scale, implementation="triton")
    torch.cuda.synchronize()
    new = (2, 11, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        recorded = scale_attention(qkv, new, pattern, head_scale=scale, implementation="triton")
    torch.empty(2**22, device=DEVICE).fill_(float("nan"))
    graph.replay()
    expected = scale_attention(qkv, new, pattern, head_scale=scale, implementation="triton")
    assert torch.equal(recorded, expected)


@pytest.mark.parametrize("normalized", [True, False])
def test_tuning(normalized: bool) -> None:
    """Every candidate is measured or left out; what it found is sorted."""
    found = triton_attention.tune(
        lengths_of((1, 2, 8)),
        False,
        batch=2,
        heads=2,
        head_size=64,
        dtype=torch.bfloat16,
        normalized=normalized,
        device=DEVICE,
    )
    for kind in ("forward", "queries", "keys"):
        times = [entry["ms"] for entry in found[kind]]
        assert times == sorted(times) and times[0] > 0
        fields = {field.name for field in dataclasses.fields(Setting)}
        assert all(set(entry) == {"ms", *fields} for entry in found[kind])

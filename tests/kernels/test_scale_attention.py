"""Every implementation against the reference in float64: outputs, log-sum-exps and every gradient."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hmar_kernels import IMPLEMENTATIONS, choose, measure, scale_attention, unavailable
from judging import bounds_of, inputs, judge, lengths_of, results, strided

CPU = torch.device("cpu")
ON_CPU = ("reference", "triton", "sdpa", "masked")
"""Implementations that run on a CPU, Triton's in its interpreter."""
SIDES = [(1,), (5,), (1, 1, 1), (1, 2, 3, 4), ((2, 3), (3, 5)), (1, (1, 7), 8)]
PATTERNS = ["causal", "diagonal"]


@pytest.fixture(params=ON_CPU)
def name(request: pytest.FixtureRequest) -> str:
    implementation: str = request.param
    reason = unavailable(implementation, device=CPU, dtype=torch.float32, head_size=32, pattern="causal")
    if reason:  # on a GPU machine Triton compiles, and tests/gpu has its tests
        pytest.skip(f"{implementation}: {reason}")
    return implementation


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("normalized", [True, False])
def test_packed(name: str, pattern: str, sides: tuple, normalized: bool) -> None:
    qkv, grad, scale = inputs(sides)
    judge(name, qkv, grad, scale if normalized else None, sides, pattern)


@pytest.mark.parametrize("size", [32, 64, 96, 128])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_head_sizes_of_one_image_and_head(name: str, pattern: str, size: int) -> None:
    sides = (1, 2, 4)
    judge(name, *inputs(sides, 1, 1, size), sides, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("normalized", [True, False])
def test_parts_of_any_strides(name: str, pattern: str, normalized: bool) -> None:
    """Tensors that lie in memory by head, with gaps between tokens, and repeated over images."""
    sides = (1, 2, (2, 3))
    qkv, grad, scale = inputs(sides)
    parts, strided_grad = strided(qkv, grad, offset=3)
    judge(name, parts, strided_grad, scale if normalized else None, sides, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_view_of_a_wider_projection(name: str, pattern: str) -> None:
    """Packed tensors are read where they lie; the gradient is packed."""
    sides = (1, 2, 3)
    qkv, grad, scale = inputs(sides)
    wide = torch.full((2, 14, 3 * 2 * 32 + 8), float("nan"))
    wide[..., 8:] = qkv.flatten(2)
    view = wide[..., 8:].unflatten(-1, (3, 2, 32))
    assert not view.is_contiguous()
    judge(name, view, grad, scale, sides, pattern)


@pytest.mark.parametrize("name", ["reference", "sdpa", "masked"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("normalized", [True, False])
def test_bf16(name: str, pattern: str, normalized: bool) -> None:
    sides = (1, 2, 3, 4)
    qkv, grad, scale = inputs(sides, dtype=torch.bfloat16)
    judge(name, qkv, grad, scale if normalized else None, sides, pattern)


@pytest.mark.parametrize("exponent", [-20, 10])
@pytest.mark.parametrize("normalized", [True, False])
def test_large_and_tiny_numbers(name: str, exponent: int, normalized: bool) -> None:
    """Scores of thousands, where one key has all the weight, and of almost nothing."""
    sides = (1, 2, 3)
    qkv, grad, scale = inputs(sides)
    judge(name, qkv * 2.0**exponent, grad, scale if normalized else None, sides, "causal", 1 / 32)


def test_queries_and_keys_of_length_zero(name: str) -> None:
    """Nothing is divided by less than 1e-12: scores are 0, and the gradient is that of x / 1e-12."""
    sides = (1, 2, 3)
    qkv, grad, scale = inputs(sides)
    qkv[0, 2:6, 0] = 0
    qkv[1, 3, 1] = 0
    qkv[1, 8:] = 0
    judge(name, qkv, grad, scale, sides, "diagonal")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("queries", [9, 13])
def test_earlier_keys_from_a_cache(name: str, pattern: str, queries: int) -> None:
    """Queries of the last scales alone; a causal one gets what it gets within the whole sequence."""
    sides = (1, 2, 3)
    qkv, grad, scale = inputs(sides)
    q, k, v = qkv.unbind(2)
    judge(name, (q[:, -queries:], k, v), grad[:, -queries:], scale, sides, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_memory_is_taken_for_zero(name: str, pattern: str) -> None:
    """New tensors come filled with NaN, and none shows in a result."""
    sides = (1, (1, 5), 3)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        judge(name, *inputs(sides), sides, pattern)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_forward_repeats(name: str) -> None:
    sides = (1, 2, 3, 4)
    qkv, _, scale = inputs(sides)
    first, second = (
        scale_attention(qkv, sides, "causal", head_scale=scale, implementation=name) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", ["boundary", "key", "heads", "unit", "values"])
def test_the_budget_is_too_small_for_mistakes(wrong: str, dtype: torch.dtype) -> None:
    """A scale that ends a token early, a key's sign, head scales swapped, keys not normalised, values swapped."""
    sides = (1, 2, 3, 4)
    lengths = lengths_of(sides)
    qkv, grad, scale = inputs(sides, dtype=dtype)
    mistaken, taken, mistaken_scale = qkv.clone(), lengths, scale
    if wrong == "boundary":
        taken = (1, 4, 8, 17)
    elif wrong == "key":
        mistaken[:, -1, 1] *= -1
    elif wrong == "heads":
        mistaken_scale = scale.flip(0)
    elif wrong == "unit":
        mistaken[:, :, 0] = torch.nn.functional.normalize(mistaken[:, :, 0], dim=-1) * scale[:, None]
        mistaken_scale = None
    else:
        mistaken[:, [3, 4], 2] = mistaken[:, [4, 3], 2]
    found = results(
        "reference", mistaken, grad, mistaken_scale, tuple((1, n) for n in taken), "diagonal", 0.3
    )
    bounds = bounds_of(qkv, grad, scale, sides, "diagonal", 0.3)
    assert {"out", "dq", "dk"} <= {key for key, value in found.items() if bounds[key].share(value) > 1}


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_reference_means_what_it_says(pattern: str, normalized: bool) -> None:
    """Against sums written out number by number, in float64."""
    sides = (1, 2, (1, 3))
    qkv, _, scale = inputs(sides, batch=1, size=4, dtype=torch.float64)
    out, lse = scale_attention(
        qkv,
        sides,
        pattern,
        softmax_scale=0.7,
        head_scale=scale if normalized else None,
        implementation="reference",
        return_lse=True,
    )
    assert out.dtype == lse.dtype == torch.float64
    scales = [k for k, n in enumerate(lengths_of(sides)) for _ in range(n)]
    for i, h in itertools.product(range(len(scales)), range(2)):
        q, weights = qkv[0, i, 0, h].tolist(), {}
        for j in range(len(scales)):
            if scales[j] == scales[i] or (pattern == "causal" and scales[j] < scales[i]):
                k = qkv[0, j, 1, h].tolist()
                score = 0.7 * sum(a * b for a, b in zip(q, k, strict=True))
                weights[j] = math.exp(
                    score * scale[h].item() / math.hypot(*q) / math.hypot(*k) if normalized else score
                )
        total = sum(weights.values())
        expected = sum(w / total * qkv[0, j, 2, h] for j, w in weights.items())
        torch.testing.assert_close(out[0, i, h], expected)
        assert lse[0, h, i].item() == pytest.approx(math.log(total))


def test_arithmetic_is_that_of_the_inputs_under_autocast(name: str) -> None:
    sides = (1, 2)
    qkv, _, scale = inputs(sides)
    settings = {"head_scale": scale, "implementation": name}
    expected = scale_attention(qkv, sides, "causal", **settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scale_attention(qkv, sides, "causal", **settings), expected)


def test_wrong_arguments() -> None:
    qkv, _, scale = inputs((1, 2))
    q, k, v = qkv.unbind(2)
    for given, sides, pattern, settings, match in [
        (qkv, (1, 3), "causal", {}, "5 tokens in all, got 10"),
        (qkv, (), "causal", {}, "one or more scales"),
        (qkv, (1, 0), "causal", {}, "at least 1"),
        (qkv, (1, 2), "full", {}, "'causal' or 'diagonal', got 'full'"),
        (qkv[:, :, :2], (1, 2), "causal", {}, r"expected qkv \[B, L, 3, H, D\], got \[2, 5, 2"),
        ((q[:, -2:], k, v), (1, 2), "causal", {}, "2 queries to be whole scales"),
        ((q, k, v[:, 1:]), (1, 2), "causal", {}, r"expected q \[B, N, H, D\]"),
        ((q, k, v.half()), (1, 2), "causal", {}, "one floating dtype"),
        (qkv.long(), (1, 2), "causal", {}, "one floating dtype"),
        (qkv[..., ::2], (1, 2), "causal", {}, "last stride is 1"),
        (qkv, (1, 2), "causal", {"softmax_scale": 0.0}, "above 0"),
        (qkv, (1, 2), "causal", {"head_scale": scale[:1]}, r"head scale \[2\]"),
        (qkv, (1, 2), "causal", {"implementation": "fast"}, "auto, measure, reference, triton"),
        (qkv, (1, 2), "causal", {"implementation": "flex"}, "CUDA GPUs alone, the tensors are on cpu"),
        (qkv, (1, 2), "causal", {"implementation": "varlen"}, "own scale alone"),
        (qkv, (1, 2), "causal", {"implementation": "sdpa", "return_lse": True}, "log-sum-exp, got 'sdpa'"),
    ]:
        with pytest.raises(ValueError, match=match):
            scale_attention(given, sides, pattern, **settings)


def test_the_choice_says_why() -> None:
    place = {"device": CPU, "dtype": torch.float32, "head_size": 64, "pattern": "diagonal"}
    assert choose("auto", **place) == ("sdpa", "one dense call per scale is the fastest without a GPU")
    assert choose("masked", **place) == ("masked", "asked for by name")
    for implementation in IMPLEMENTATIONS:
        reason = unavailable(implementation, **place)
        assert reason is None or (reason and "\n" not in reason)
    with pytest.raises(ValueError, match="varlen' cannot run here"):
        choose("varlen", **place)
    shape = {"batch": 2, "heads": 2, "head_size": 32, "dtype": torch.float32, "device": CPU}
    assert measure((1, 2), "causal", **shape) == choose("auto", **place)
    qkv, _, _ = inputs((1, 2))
    measured = scale_attention(qkv, (1, 2), "causal", implementation="measure")
    assert torch.equal(measured, scale_attention(qkv, (1, 2), "causal", implementation="sdpa"))


def test_all_but_one_run_without_triton() -> None:
    """In a fresh process where Triton cannot be imported."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from hmar_kernels import choose, scale_attention, unavailable
assert not any(name.startswith("triton.") for name in sys.modules)
qkv = torch.ones(1, 5, 3, 1, 32)
for name in ("reference", "sdpa", "masked", "auto"):
    assert torch.equal(scale_attention(qkv, (1, 2), "causal", implementation=name), qkv[:, :, 0])
place = {"device": torch.device("cpu"), "dtype": torch.float32, "head_size": 32, "pattern": "causal"}
print(unavailable("triton", **place))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton" in done.stdout and "import" in done.stdout

"""Every implementation against the reference in float64: outputs and gradients."""

import itertools

import pytest
import torch
from hmar_kernels import IMPLEMENTATIONS, choose, scale_attention
from torch import Tensor

LENGTHS = [(1,), (1, 1, 1), (1, 4, 9, 16), (2, 6, 15), (1, 4, 64)]
OTHERS = [name for name in IMPLEMENTATIONS if name != "reference"]


def inputs(lengths: tuple[int, ...], queries: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = (2, sum(lengths), 3, 16)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return q[:, -queries:].contiguous(), k, v


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_outputs_and_gradients(name: str, pattern: str, lengths: tuple[int, ...]) -> None:
    results = []
    for implementation, dtype in (("reference", torch.float64), (name, torch.float32)):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs(lengths))
        out = scale_attention(q, k, v, lengths, pattern, softmax_scale=0.3, implementation=implementation)
        out.square().sum().backward()
        results.append([x.detach().double() for x in (out, q.grad, k.grad, v.grad)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_reference_sees_what_the_pattern_says() -> None:
    """A value is felt exactly by the queries of its own scale, and of later ones where causal."""
    lengths = (1, 4, 9)
    scale = [k for k, n in enumerate(lengths) for _ in range(n)]
    q, k, v = inputs(lengths)
    for pattern, position in itertools.product(("causal", "diagonal"), range(sum(lengths))):
        changed = v.clone()
        changed[:, position] += 1
        before, after = (
            scale_attention(q, k, x, lengths, pattern, implementation="reference") for x in (v, changed)
        )
        felt = (before != after).flatten(2).any(-1).any(0).tolist()
        sees = [s >= scale[position] if pattern == "causal" else s == scale[position] for s in scale]
        assert felt == sees


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_cached_keys_equal_the_whole_sequence(name: str) -> None:
    """Queries of the last scales alone get what they get within the whole sequence."""
    lengths = (1, 4, 9)
    q, k, v = inputs(lengths)
    whole = scale_attention(q, k, v, lengths, "causal", implementation=name)
    for queries in (9, 13):
        part = scale_attention(q[:, -queries:], k, v, lengths, "causal", implementation=name)
        torch.testing.assert_close(part, whole[:, -queries:])


def test_wrong_arguments() -> None:
    q, k, v = inputs((1, 4))
    with pytest.raises(ValueError, match="sum to 5"):
        scale_attention(q, k, v, (1, 3), "causal")
    with pytest.raises(ValueError, match="whole scales"):
        scale_attention(q[:, -2:], k, v, (1, 4), "causal")
    with pytest.raises(ValueError, match="pattern"):
        scale_attention(q, k, v, (1, 4), "full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="auto, reference"):
        choose("fast")
    assert choose("auto")[0] in IMPLEMENTATIONS

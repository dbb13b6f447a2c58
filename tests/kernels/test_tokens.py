"""Passes over tokens in Triton's interpreter, against float64."""

import pytest
import torch
from hmar_kernels import gated_sum, modulated_norm, unit_heads, unserved
from torch import Tensor

if reason := unserved(torch.zeros(1)):
    pytest.skip(f"compiled here, tests/gpu has its tests: {reason}", allow_module_level=True)

from token_budget import gated_sum_bounds, modulated_norm_bounds, unit_heads_bounds

draws = torch.Generator()


@pytest.fixture(autouse=True)
def seeded() -> None:
    draws.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=draws)


@pytest.mark.parametrize("width", [64, 100, 1])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_norm(width: int, mean: float) -> None:
    x, vectors = draw(3, 5, width) + mean, draw(3, 6, 1, width)
    for scale, shift in (vectors.unbind(1)[2:4], draw(2, width), (draw(3, 5, width), draw(1, 5, 1))):
        found = modulated_norm(x, scale, shift, 1e-6, torch.float32)
        modulated_norm_bounds(x, scale, shift, 1e-6, torch.float32).check(found, "modulated_norm")
    plain = torch.nn.functional.layer_norm(x.double(), [width], eps=1e-6) * (1 + scale.double()) + shift
    bounds = modulated_norm_bounds(x, scale, shift, 1e-6, torch.float32)
    torch.testing.assert_close(bounds.exact, plain, rtol=1e-9, atol=1e-9)


def test_the_bounds_are_narrow() -> None:
    """Without eps, or with a variance from the mean of squares, a result is far outside."""
    x, none = draw(2, 3, 64), torch.zeros(64)
    for rows, eps, squares in ((x * 1e-3, 0.0, False), (x + 1000, 1e-6, True)):
        apart = rows - rows.mean(-1, keepdim=True)
        square = rows.square().mean(-1, keepdim=True) - rows.mean(-1, keepdim=True).square()
        variance = square if squares else apart.square().mean(-1, keepdim=True)
        bounds = modulated_norm_bounds(rows, none, none, 1e-6, torch.float32)
        bounds.check(modulated_norm(rows, none, none, 1e-6, torch.float32), "modulated_norm")
        assert bounds.share(apart * (variance + eps).rsqrt()) > 10


def test_dtypes_and_layouts() -> None:
    x, vectors = draw(4, 3, 24).half().transpose(0, 1), draw(3, 24)
    found = modulated_norm(x, vectors[0].half(), vectors[1], 1e-5, torch.float32)
    modulated_norm_bounds(x, vectors[0].half(), vectors[1], 1e-5, torch.float32).check(
        found, "modulated_norm"
    )
    y = draw(3, 24, 4).transpose(1, 2)
    found = gated_sum(x, vectors[2], y)
    assert found.dtype == torch.float32
    gated_sum_bounds(x, vectors[2], y).check(found, "gated_sum")


@pytest.mark.parametrize("width", [64, 100])
def test_sum(width: int) -> None:
    x, y, vectors = draw(3, 5, width), draw(3, 5, width) * 9, draw(3, 6, 1, width)
    for gate in (vectors[:, 1], draw(3, 5, width), draw(1, 5, width)):
        gated_sum_bounds(x, gate, y).check(gated_sum(x, gate, y), "gated_sum")


@pytest.mark.parametrize("heads", [1, 3, 9])
@pytest.mark.parametrize("size", [32, 96])
def test_heads(heads: int, size: int) -> None:
    qkv = draw(2, 17, 3, heads, size)
    qkv[0, 3] = 0
    q, scale = qkv.unbind(2)[1], draw(heads, 2)
    for each in (None, scale[:, 0], scale[:1, 1].expand(heads)):
        found = unit_heads(q, each)
        assert found.is_contiguous()
        unit_heads_bounds(q, each).check(found, "unit_heads")
    strange = q.transpose(1, 3)
    unit_heads_bounds(strange, None).check(unit_heads(strange), "unit_heads")


def test_what_is_not_served() -> None:
    x = draw(2, 3, 8)
    with pytest.raises(
        ValueError, match=r"expected x \[B, N, C\] and what broadcasts to it, got \[2, 3, 8\]"
    ):
        gated_sum(x, draw(4, 8), x)
    with pytest.raises(ValueError, match="no backward pass"):
        modulated_norm(x.requires_grad_(), x, x, 1e-6, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        gated_sum(x.detach(), x.detach().double(), x.detach())
    with pytest.raises(ValueError, match="on one device, got cpu, cpu, meta"):
        gated_sum(x.detach(), draw(2, 3, 8), draw(2, 3, 8).to("meta"))
    with pytest.raises(ValueError, match=r"expected x \[B, N, H, D\] and a scale \[H\] or None"):
        unit_heads(draw(1, 2, 3, 4), draw(2))

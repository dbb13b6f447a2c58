"""Runs attention and compares all that it gives with the bounds of `budget`; for tests on CPUs and GPUs."""

import torch
from budget import Bounded, budget
from hmar_kernels import scale_attention
from torch import Tensor

WITH_LSE = ("reference", "triton", "flex", "varlen")
"""Implementations that give the log-sum-exp."""

Results = dict[str, Tensor]


def lengths_of(sides: tuple) -> tuple[int, ...]:
    return tuple(side**2 if isinstance(side, int) else side[0] * side[1] for side in sides)


def inputs(
    sides: tuple,
    batch: int = 2,
    heads: int = 2,
    size: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """A packed projection, the output's gradient and a head scale."""
    total = sum(lengths_of(sides))
    generator = torch.Generator(device).manual_seed(total)
    place = {"generator": generator, "device": device}
    qkv = torch.randn((batch, total, 3, heads, size), **place).to(dtype)
    grad = torch.randn((batch, total, heads, size), **place).to(dtype)
    return qkv, grad, 1 + 9 * torch.rand(heads, **place)


def strided(qkv: Tensor, grad: Tensor, offset: int = 8) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Queries and a gradient that lie by head, keys with gaps between tokens and heads, values of one image.

    The keys' first number lies `offset` numbers behind a boundary in memory.
    """
    q, k, v = qkv.unbind(2)
    gaps = k.new_full((k.shape[0], 2 * k.shape[1], k.shape[2], k.shape[3] + 16), float("nan"))
    keys = gaps[:, ::2, :, offset : offset + k.shape[3]]
    keys.copy_(k)
    by_head, by_head_too = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, grad))
    return (by_head, keys, v[:1].expand(len(v), -1, -1, -1)), by_head_too


def results(
    name: str,
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    head_scale: Tensor | None,
    sides: tuple,
    pattern: str,
    softmax_scale: float,
) -> Results:
    """Output, log-sum-exp where there is one, and gradients."""
    leaves = [x.detach().requires_grad_() for x in (qkv if isinstance(qkv, tuple) else (qkv,))]
    scale = None if head_scale is None else head_scale.detach().requires_grad_()
    given = tuple(leaves) if isinstance(qkv, tuple) else leaves[0]
    settings = {"softmax_scale": softmax_scale, "head_scale": scale, "implementation": name}
    if name in WITH_LSE:
        out, lse = scale_attention(given, sides, pattern, return_lse=True, **settings)
        assert not lse.requires_grad
        found = {"out": out.detach(), "lse": lse}
    else:
        out = scale_attention(given, sides, pattern, **settings)
        found = {"out": out.detach()}
    assert out.is_contiguous() and out.dtype == grad.dtype
    out.backward(grad)
    grads = leaves[0].grad.unbind(2) if isinstance(qkv, Tensor) else [x.grad for x in leaves]
    found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return found | ({} if scale is None else {"dscale": scale.grad})


def bounds_of(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    head_scale: Tensor | None,
    sides: tuple,
    pattern: str,
    softmax_scale: float,
) -> dict[str, Bounded]:
    """The exact results and how far they may be off."""
    parts = qkv.unbind(2) if isinstance(qkv, Tensor) else qkv
    return budget(*parts, grad, head_scale, lengths_of(sides), pattern == "causal", softmax_scale)


def compare(name: str, found: Results, bounds: dict[str, Bounded]) -> None:
    """Fail where a result of an implementation is further off than allowed, or lacks."""
    assert set(found) == set(bounds) - (set() if name in WITH_LSE else {"lse"})
    for key, value in found.items():
        bounds[key].check(value, f"{name} {key}")


def judge(
    name: str,
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    head_scale: Tensor | None,
    sides: tuple,
    pattern: str,
    softmax_scale: float = 0.3,
) -> None:
    """Run an implementation and compare."""
    given = (qkv, grad, head_scale, sides, pattern, softmax_scale)
    compare(name, results(name, *given), bounds_of(*given))

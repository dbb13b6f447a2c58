"""Triton: modulated LayerNorm, gated sums, and heads of length one.

A program takes a token, or some neighbouring heads of a few tokens.

Letters: B batch, N tokens, C width, H heads, D head size.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"

import torch
import triton
import triton.language as tl
from hmar_kernels.triton_forward import inverse_norm
from torch import Tensor

SIZES = ["tokens", "heads"]
"""Arguments whose values never make a kernel of their own."""
NUMBERS = 8
"""Of a token that each thread takes."""
TOKENS, HEADS = 16, 8
"""Of how many heads of how many tokens one program computes the lengths."""


@triton.jit
def load_token(source, strides, tokens, columns, C: tl.constexpr):
    """[WIDTH] numbers of this program's token in float32, zeros beyond C; strides are of B and N."""
    b, at = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    source += b * strides[0] + at * strides[1]
    return tl.load(source + columns, mask=columns < C, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def norm_kernel(
    x, scale, shift, out, scale_strides, shift_strides, tokens, eps, C: tl.constexpr, WIDTH: tl.constexpr
):
    """One token of LayerNorm(x) * (1 + scale) + shift; x and out [B, N, C] are contiguous."""
    columns = tl.arange(0, WIDTH)
    value = load_token(x, (tl.cast(tokens, tl.int64) * C, C), tokens, columns, C)
    apart = tl.where(columns < C, value - tl.sum(value, 0) / C, 0.0)
    unit = apart * tl.rsqrt(tl.sum(apart * apart, 0) / C + eps)
    value = unit * (1.0 + load_token(scale, scale_strides, tokens, columns, C))
    value += load_token(shift, shift_strides, tokens, columns, C)
    out += tl.cast(tl.program_id(0), tl.int64) * C
    tl.store(out + columns, value.to(out.dtype.element_ty), mask=columns < C)


@triton.jit(do_not_specialize=SIZES)
def sum_kernel(x, gate, y, out, gate_strides, y_strides, tokens, C: tl.constexpr, WIDTH: tl.constexpr):
    """One token of x + gate * y; x and out [B, N, C] are contiguous."""
    columns = tl.arange(0, WIDTH)
    value = load_token(gate, gate_strides, tokens, columns, C) * load_token(y, y_strides, tokens, columns, C)
    value += load_token(x, (tl.cast(tokens, tl.int64) * C, C), tokens, columns, C)
    out += tl.cast(tl.program_id(0), tl.int64) * C
    tl.store(out + columns, value.to(out.dtype.element_ty), mask=columns < C)


@triton.jit(do_not_specialize=SIZES)
def heads_kernel(
    x, head_scale, out, strides, tokens, heads, D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Neighbouring heads of a few tokens of x [B, N, H, D], strides of B, N, H and D, to out, contiguous."""
    groups, blocks = tl.cdiv(heads, HEADS), tl.cdiv(tokens, TOKENS)
    place = tl.program_id(0) // groups
    b = tl.cast(place // blocks, tl.int64)
    rows = tl.arange(0, TOKENS * HEADS)
    h = tl.program_id(0) % groups * HEADS + rows % HEADS
    at = place % blocks * TOKENS + rows // HEADS
    columns = tl.arange(0, WIDTH)
    inside = ((h < heads) & (at < tokens))[:, None] & (columns < D)[None, :]
    places = (tl.cast(at, tl.int64) * strides[1] + tl.cast(h, tl.int64) * strides[2])[:, None]
    value = tl.load(x + b * strides[0] + places + columns[None, :] * strides[3], mask=inside, other=0.0)
    factor = inverse_norm(value)
    if head_scale is not None:
        factor *= tl.load(head_scale + h, mask=h < heads, other=0.0).to(tl.float32)
    value = value.to(tl.float32) * factor[:, None]
    places = (((b * tokens + at) * heads + h) * D)[:, None] + columns[None, :]
    tl.store(out + places, value.to(out.dtype.element_ty), mask=inside)


def by_token(x: Tensor) -> tuple[int, dict[str, int]]:
    """The number of programs, one a token of x [B, N, C], and their constants."""
    width = triton.next_power_of_2(x.shape[2])
    warps = min(max(width // (32 * NUMBERS), 1), 8)
    return x.shape[0] * x.shape[1], {"C": x.shape[2], "WIDTH": width, "num_warps": warps}


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `hmar_kernels.modulated_norm`; x is contiguous, the others are of its shape."""
    out = torch.empty_like(x, dtype=dtype)
    programs, constants = by_token(x)
    strides = scale.stride()[:2], shift.stride()[:2]
    norm_kernel[(programs,)](x, scale, shift, out, *strides, x.shape[1], eps, **constants)
    return out


def gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """See `hmar_kernels.gated_sum`; x is contiguous, the others are of its shape."""
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype))
    programs, constants = by_token(x)
    strides = gate.stride()[:2], y.stride()[:2]
    sum_kernel[(programs,)](x, gate, y, out, *strides, x.shape[1], **constants)
    return out


def unit_heads(x: Tensor, head_scale: Tensor | None) -> Tensor:
    """See `hmar_kernels.unit_heads`."""
    batch, tokens, heads, size = x.shape
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    programs = batch * triton.cdiv(tokens, TOKENS) * triton.cdiv(heads, HEADS)
    heads_kernel[(programs,)](
        x, head_scale, out, x.stride(), tokens, heads, D=size, WIDTH=triton.next_power_of_2(size),
        TOKENS=TOKENS, HEADS=HEADS,
    )  # fmt: skip
    return out

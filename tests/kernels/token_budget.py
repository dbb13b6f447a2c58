"""How far passes over tokens may be from the exact result: a bound for every number, as in `budget`.

Numbers are rounded once, when they are stored; sums over a width C are trees of additions in float32.
"""

import math

import torch
from budget import EPS, UNIT32, Bounded, Kept
from torch import Tensor

INVERSE_ROOT = 2.0**-21
"""How far the inverse of a square root may be off, relative: GPUs promise two units in the last place."""


def modulated_norm_bounds(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Bounded:
    """LayerNorm(x) * (1 + scale) + shift of x [B, N, C], in `dtype`."""
    kept, (x, scale, shift) = Kept(dtype), (each.double() for each in (x, scale, shift))
    tree = (math.log2(x.shape[-1]) + 3) * UNIT32
    mean = x.mean(-1, keepdim=True)
    apart = x - mean
    variance = apart.square().mean(-1, keepdim=True)
    e_mean = tree * x.abs().mean(-1, keepdim=True)
    e_apart = e_mean + UNIT32 * apart.abs()
    e_variance = 2 * e_mean * apart.abs().mean(-1, keepdim=True) + e_mean**2 + 2 * tree * variance
    root = (variance + eps).sqrt()
    off = root / ((variance - e_variance).clamp_min(0) + eps).sqrt() - 1 + INVERSE_ROOT
    unit = apart / root
    error = (unit.abs() * (off + 4 * UNIT32) + e_apart / root * (1 + off)) * (1 + scale.abs())
    exact = unit * (1 + scale) + shift
    return Bounded(exact, error + 2 * UNIT32 * (exact.abs() + shift.abs()) + kept(exact))


def gated_sum_bounds(x: Tensor, gate: Tensor, y: Tensor) -> Bounded:
    """X + gate * y in the wider dtype of x and y."""
    kept, (x, gate, y) = Kept(torch.promote_types(x.dtype, y.dtype)), (each.double() for each in (x, gate, y))
    exact = x + gate * y
    return Bounded(exact, 2 * UNIT32 * (x.abs() + (gate * y).abs()) + kept(exact))


def unit_heads_bounds(x: Tensor, head_scale: Tensor | None) -> Bounded:
    """X [B, N, H, D] over its length, times head_scale [H], in x's dtype."""
    kept, exact = Kept(x.dtype), x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(EPS)
    if head_scale is not None:
        exact = exact * head_scale.double()[:, None]
    tree = (math.log2(x.shape[-1]) + 8) * UNIT32
    return Bounded(exact, exact.abs() * (tree + INVERSE_ROOT) + kept(exact))

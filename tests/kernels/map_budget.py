"""How far norms and sums of feature maps may be from the exact result: a bound for every number, as in `budget`.

Numbers are rounded once, when they are stored; what comes before is float32. A number goes into the mean of its
channel by means that are updated, each rounded, and into the sum of its group by a tree of additions.

Letters: B batch, C channels, H W height and width, G groups.
"""

import math

import torch
from budget import EXPONENTIAL, UNIT32, Bounded, Kept
from hmar_kernels import triton_feature_maps
from torch import Tensor


def steps_of(positions: int, channels: int, groups: int) -> int:
    """How often a mean is updated."""
    stretch, _, _ = triton_feature_maps.cut_positions(positions, channels // groups)
    _, constants = triton_feature_maps.tiles(triton_feature_maps.STATISTICS, channels)
    return -(-stretch // constants["ROWS"])


def norm_bounds(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, conv_bias: Tensor | None, silu: bool
) -> Bounded:
    """SiLU(GroupNorm(x + conv_bias)) of x [B, C, H, W] in x's dtype."""
    channels, positions = x.shape[1], x[0, 0].numel()
    kept, exact = Kept(x.dtype), x.double()
    weight, bias, added = (
        (torch.zeros_like(bias) if n is None else n).double()[:, None, None]
        for n in (weight, bias, conv_bias)
    )
    steps = steps_of(positions, channels, groups)
    chain = 2 * steps + math.log2(exact[0].numel() // groups) + 8  # roundings on the way of one number

    def grouped(y: Tensor) -> Tensor:
        return y.unflatten(1, (groups, -1)).flatten(2)  # [B, G, CHW/G]

    def spread(y: Tensor) -> Tensor:
        return y.repeat_interleave(channels // groups, 1)[..., None]  # [B, G, 1] to [B, C, 1, 1]

    moved = grouped(exact + added)
    largest = torch.maximum(grouped(exact.abs()), grouped(added.abs().expand_as(exact)))
    largest = torch.maximum(largest, moved.abs()).amax(-1, keepdim=True)
    mean = moved.mean(-1, keepdim=True)
    apart = (moved - mean).abs()
    variance = apart.square().mean(-1, keepdim=True)
    e_mean = UNIT32 * ((steps + 4) * largest + chain * apart.amax(-1, keepdim=True))
    e_variance = 2 * e_mean * apart.mean(-1, keepdim=True) + e_mean**2 + 2 * chain * UNIT32 * variance
    least = (variance - e_variance).clamp_min(0) + eps
    off = spread((variance + eps).div(least).sqrt() - 1) + EXPONENTIAL + 2 * UNIT32  # of the factor, relative
    factor = weight.abs() * spread((variance + eps).rsqrt())
    middle = weight * spread((variance + eps).rsqrt()) * (exact + added - spread(mean))
    y = middle + bias
    error = middle.abs() * off + factor * (1 + off) * spread(e_mean) + UNIT32 * (bias.abs() + 2 * y.abs())
    error += 4 * UNIT32 * factor * (exact.abs() + added.abs() + spread(mean).abs())
    if silu:
        share = torch.sigmoid(y)
        y, slope = y * share, 1.1  # the steepest
        error = slope * error + y.abs() * (2 * EXPONENTIAL + 4 * UNIT32)
        error += y.abs() * 2 * UNIT32 * (1 - share) * (y / share).abs()  # of the exponential's argument
    return Bounded(y, error + kept(y))


def sum_bounds(x: Tensor, y: Tensor, bias: Tensor) -> Bounded:
    """x + y + bias in x's dtype."""
    kept, added = Kept(x.dtype), bias.double()[:, None, None]
    exact = x.double() + y.double() + added
    return Bounded(exact, 2 * UNIT32 * (x.double().abs() + y.double().abs() + added.abs()) + kept(exact))

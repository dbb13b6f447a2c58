"""Triton: GroupNorm with SiLU of channels-last feature maps, and their sums; each adds a number to every channel.

A feature map lies in memory as a matrix whose rows are positions and whose columns are channels. A tile is a block of
columns of some rows. GroupNorm runs three kernels: the statistics of every channel over stretches of positions, of
which a program takes one, tile by tile; a factor and an offset for every channel, from the statistics of its group;
and the result, where a program takes a tile, as it does in sums. The stretches depend on the size of a map alone, so
that an image gets the same numbers in every batch.

Letters: B batch, C channels, P positions, S stretches of positions, W columns of a block.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"
# ruff: noqa: SIM108 - Triton compiles the one branch of a constant condition

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZES = ["positions", "stretch"]
"""Arguments whose values never make a kernel of their own."""
STRETCHES, LEAST = 256, 32
"""At most so many stretches, each of at least so many positions."""
GROUP_TILE = 8192
"""At most so many numbers of one group in registers, a number for each channel and stretch."""


@dataclass(frozen=True)
class Cut:
    """How a kernel cuts its work.

    Attributes:
        tile: numbers that a program takes at a time.
        warps: of a program.
    """

    tile: int
    warps: int


STATISTICS, RESULT = Cut(2048, 4), Cut(1024, 4)
WIDEST = 256
"""Columns of a block at most."""


@triton.jit
def block_of(C: tl.constexpr, WIDTH: tl.constexpr):
    """The columns of this program's block, [W], and which of its rows' programs it is."""
    BLOCKS: tl.constexpr = (C + WIDTH - 1) // WIDTH
    return tl.program_id(0) % BLOCKS * WIDTH + tl.arange(0, WIDTH), tl.program_id(0) // BLOCKS


@triton.jit
def within(rows, columns, count, C: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, W]: which are among the first `count` rows and C columns."""
    inside = (rows < count)[:, None]
    if C % WIDTH != 0:
        inside = inside & (columns < C)[None, :]
    return inside


@triton.jit
def load_columns(source, columns, C: tl.constexpr, WIDTH: tl.constexpr):
    """[W] numbers in float32, zeros beyond C."""
    if C % WIDTH != 0:
        x = tl.load(source + columns, mask=columns < C, other=0.0)
    else:
        x = tl.load(source + columns)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    x, parts, positions, stretch, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One stretch of x [B, P, C]: the mean of each channel and its squared deviations' sum, to parts [B, S, 2, C].

    Every place of the tile keeps a mean and a sum of its own (Welford); they are merged at the end (Chan et al.).
    """
    columns, part = block_of(C, WIDTH)
    stretches = tl.cdiv(positions, stretch)
    first = part % stretches * stretch
    count = tl.minimum(stretch, positions - first)
    rows = tl.arange(0, ROWS)
    x += (tl.cast(part // stretches, tl.int64) * positions + first) * C
    mean = tl.zeros([ROWS, WIDTH], tl.float32)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    seen = 0.0
    for start in tl.range(0, count, ROWS):
        inside = within(start + rows, columns, count, C, WIDTH)
        pointers = x + tl.cast(start, tl.int64) * C + rows[:, None] * C + columns[None, :]
        value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        seen += 1.0
        deviation = tl.where(inside, value - mean, 0.0)
        mean += deviation * (1.0 / seen)
        squares += deviation * (value - mean)
    counts = tl.cdiv(count - rows, ROWS).to(tl.float32)[:, None]  # of each place
    center = tl.sum(counts * mean, 0) / count
    center += tl.sum(counts * (mean - center[None, :]), 0) / count  # what the first sum lost
    apart = mean - center[None, :]
    parts += tl.cast(part, tl.int64) * 2 * C + columns
    tl.store(parts, center, mask=columns < C)
    tl.store(parts + C, tl.sum(squares + counts * apart * apart, 0), mask=columns < C)


@triton.jit(do_not_specialize=SIZES)
def factors_kernel(
    parts, factors, weight, bias, conv_bias, eps, positions, stretch, C: tl.constexpr, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One group of `SIZE` channels: factors [B, 2, C], what x is multiplied by and what is added then."""
    GROUPS: tl.constexpr = C // SIZE
    b = tl.cast(tl.program_id(0) // GROUPS, tl.int64)
    lanes = tl.arange(0, WIDTH)
    channels = tl.program_id(0) % GROUPS * SIZE + lanes
    own = lanes < SIZE
    stretches = tl.cdiv(positions, stretch)
    at = tl.arange(0, MOST)
    inside = (at < stretches)[:, None] & own[None, :]
    pointers = parts + b * stretches * 2 * C + at[:, None] * 2 * C + channels[None, :]
    mean = tl.load(pointers, mask=inside, other=0.0)  # [S, W]
    squares = tl.load(pointers + C, mask=inside, other=0.0)
    counts = tl.where(inside, tl.minimum(stretch, positions - at * stretch)[:, None], 0).to(tl.float32)
    added = tl.zeros([WIDTH], tl.float32)
    if conv_bias is not None:
        added += tl.load(conv_bias + channels, mask=own, other=0.0).to(tl.float32)
    mean += added[None, :]
    total = tl.cast(positions, tl.float32) * SIZE
    center = tl.sum(tl.sum(counts * mean, 1), 0) / total
    center += tl.sum(tl.sum(counts * (mean - center), 1), 0) / total  # what the first sum lost
    apart = mean - center
    variance = tl.sum(tl.sum(squares + counts * apart * apart, 1), 0) / total
    factor = tl.load(weight + channels, mask=own, other=0.0).to(tl.float32) * tl.rsqrt(variance + eps)
    offset = tl.load(bias + channels, mask=own, other=0.0).to(tl.float32) + (added - center) * factor
    tl.store(factors + b * 2 * C + channels, factor, mask=own)
    tl.store(factors + b * 2 * C + C + channels, offset, mask=own)


@triton.jit(do_not_specialize=SIZES)
def result_kernel(
    x, y, factors, positions, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """One tile of y [B, P, C]: SiLU of factor x + offset, or without SiLU."""
    columns, part = block_of(C, WIDTH)
    tiles = tl.cdiv(positions, ROWS)
    b = tl.cast(part // tiles, tl.int64)
    first = part % tiles * ROWS
    rows = tl.arange(0, ROWS)
    inside = within(first + rows, columns, positions, C, WIDTH)
    factor = load_columns(factors + b * 2 * C, columns, C, WIDTH)[None, :]
    offset = load_columns(factors + b * 2 * C + C, columns, C, WIDTH)[None, :]
    begin = (b * positions + first) * C
    places = rows[:, None] * C + columns[None, :]
    value = tl.load(x + begin + places, mask=inside, other=0.0).to(tl.float32) * factor + offset
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(y + begin + places, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def sum_kernel(x, y, bias, out, positions, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """One tile of x + y + bias, [P, C], the positions of all images."""
    columns, part = block_of(C, WIDTH)
    first = tl.cast(part, tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    inside = within(first + rows, columns, positions, C, WIDTH)
    begin = first * C
    places = rows[:, None] * C + columns[None, :]
    value = tl.load(y + begin + places, mask=inside, other=0.0).to(tl.float32)
    value += load_columns(bias, columns, C, WIDTH)[None, :]
    value += tl.load(x + begin + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + begin + places, value.to(out.dtype.element_ty), mask=inside)


def block_width(channels: int) -> int:
    """Columns of a block: a power of two that divides the channels, or one that leaves places of a tile idle."""
    fitting = min(channels & -channels, WIDEST)
    return fitting if fitting >= 32 else min(triton.next_power_of_2(channels), WIDEST)


def tiles(cut: Cut, channels: int) -> tuple[int, dict[str, int]]:
    """The number of blocks of columns, and the constants of a kernel that works by tiles."""
    width = block_width(channels)
    constants = {"C": channels, "WIDTH": width, "ROWS": max(cut.tile // width, 1)}
    return -(-channels // width), constants | {"num_warps": cut.warps, "enable_fp_fusion": True}


def cut_positions(positions: int, size: int) -> tuple[int, int, int]:
    """Positions of a stretch, the number of stretches and the most there can be, for groups of `size` channels."""
    most = max(min(STRETCHES, GROUP_TILE // triton.next_power_of_2(size)), 1)
    stretch = max(-(-positions // most), LEAST)
    return stretch, -(-positions // stretch), most


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, conv_bias: Tensor | None, eps: float, silu: bool
) -> Tensor:
    """See `hmar_kernels.group_norm`; x is channels-last, the numbers of channels are contiguous."""
    batch, channels, height, width = x.shape
    positions, size = height * width, channels // groups
    stretch, stretches, most = cut_positions(positions, size)
    parts = x.new_empty((batch, stretches, 2, channels), dtype=torch.float32)
    factors = x.new_empty((batch, 2, channels), dtype=torch.float32)
    y = torch.empty_like(x)
    blocks, constants = tiles(STATISTICS, channels)
    statistics_kernel[(batch * stretches * blocks,)](x, parts, positions, stretch, **constants)
    factors_kernel[(batch * groups,)](
        parts, factors, weight, bias, conv_bias, eps, positions, stretch, C=channels, SIZE=size,
        WIDTH=triton.next_power_of_2(size), MOST=most, enable_fp_fusion=True,
    )  # fmt: skip
    blocks, constants = tiles(RESULT, channels)
    programs = batch * triton.cdiv(positions, constants["ROWS"]) * blocks
    result_kernel[(programs,)](x, y, factors, positions, SILU=silu, **constants)
    return y


def add_biased(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """See `hmar_kernels.add_biased`; x and y are channels-last, the bias is contiguous."""
    batch, channels, height, width = x.shape
    positions, out = batch * height * width, torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype))
    blocks, constants = tiles(RESULT, channels)
    programs = triton.cdiv(positions, constants["ROWS"]) * blocks
    sum_kernel[(programs,)](x, y, bias, out, positions, **constants)
    return out

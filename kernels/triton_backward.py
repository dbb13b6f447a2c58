"""Triton: attention over scales, backward, in two passes over the tiles of the schedule.

The pass over tiles of queries gives their gradient and, on the way, what the other pass needs of every query: the
product of output and its gradient, and the inverse norm. The pass over tiles of keys gives the gradients of keys and
values. Both compute the weights anew from the log-sum-exp of the forward pass, and normalise queries and keys as it
does.

With q̂ = q / max(|q|, epsilon), a gradient g of q̂ becomes (g - q̂ (q̂·g)) / |q|; where the norm is clamped, g / epsilon.

Letters: as in `triton_forward`; J are rows where keys are tiles, M columns.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"
# ruff: noqa: SIM108 - Triton compiles the one branch of a constant condition

import triton
import triton.language as tl
from hmar_kernels.triton_forward import (
    EPSILON,
    LN2,
    LOG2E,
    head_of,
    inverse_norm,
    load_row,
    load_rows,
    store_rows,
)


@triton.jit
def through_norm(x, inverse, gradient):
    """The gradient of x [rows, D] from that of x / max(|x|, epsilon), and their product [rows]."""
    unit = x.to(tl.float32) * inverse[:, None]
    along = tl.sum(unit * gradient, 1)
    kept = tl.where(inverse < 0.999 / EPSILON, along, 0.0)
    return (gradient - unit * kept[:, None]) * inverse[:, None], along


@triton.jit
def _gather_queries(
    acc, q, k, k_stride, v, v_stride, column, dout, lse, delta, norms, low, high, factor, start, stop,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, INLINE: tl.constexpr,
    FOLD: tl.constexpr, BULK: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Add to acc [M, D] the gradients of scores times keys `start` to `stop`, keys normalised where NORMALIZE."""
    for first in tl.range(start, stop, BLOCK, num_stages=STAGES, warp_specialize=SPECIALIZE):
        keys = first + tl.arange(0, BLOCK)
        k_block = load_rows(k, k_stride, column, first, stop, BLOCK, D, WIDTH, PART, BULK)  # [J, D]
        if NORMALIZE:
            if INLINE:
                inverse = inverse_norm(k_block)
            else:
                inverse = load_row(norms, first, stop, BLOCK, PART)
            if not FOLD:
                k_block = (k_block.to(tl.float32) * inverse[:, None]).to(k_block.dtype)
        scores = tl.dot(q, tl.trans(k_block), input_precision="ieee")  # [M, J]
        if NORMALIZE and FOLD:
            scores = scores * inverse[None, :] - lse[:, None]
        else:
            scores = scores * factor - lse[:, None]
        if PART:
            sees = (keys[None, :] >= low[:, None]) & (keys[None, :] < tl.minimum(high, stop)[:, None])
            scores = tl.where(sees, scores, float("-inf"))
        weights = tl.exp2(scores)
        v_block = load_rows(v, v_stride, column, first, stop, BLOCK, D, WIDTH, PART, BULK)  # [J, D]
        slopes = tl.dot(dout, tl.trans(v_block), input_precision="ieee")  # [M, J]
        slopes = weights * (slopes - delta[:, None])
        if NORMALIZE and FOLD:
            slopes = slopes * inverse[None, :]
        acc = tl.dot(slopes.to(k_block.dtype), k_block, acc, input_precision="ieee")
    return acc


@triton.jit
def queries_kernel(
    q, k, v, out, dout, dq, lse, delta, inverses, norms, head_scale, d_scale, q_strides, k_strides, v_strides,
    out_strides, dout_strides, dq_strides, tiles, bounds, count, heads, queries, keys, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    INLINE: tl.constexpr, FOLD: tl.constexpr, BULK: tl.constexpr, PEEL: tl.constexpr, STAGES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: dq, and for the other pass `delta` and `inverses` [B, H, N].

    Where NORMALIZE, also this tile's part of the gradient of head_scale, to d_scale [B H, T].
    """
    tile = tiles + tl.program_id(0) % count * 6
    sample = tl.program_id(0) // count
    b, h = sample // heads, sample % heads
    first, last = tl.load(tile), tl.load(tile + 1)
    rows = first + tl.arange(0, M)
    live = rows < last
    at = tl.cast(sample, tl.int64) * queries + rows
    o_rows, o_stride, column = head_of(out, out_strides, b, h, D, False)
    o_tile = load_rows(o_rows, o_stride, 0, first, last, M, D, WIDTH, True, False)  # [M, D]
    q_rows, q_stride, column = head_of(q, q_strides, b, h, D, BULK)
    k_rows, k_stride, column = head_of(k, k_strides, b, h, D, BULK)
    v_rows, v_stride, column = head_of(v, v_strides, b, h, D, BULK)
    g_rows, g_stride, column = head_of(dout, dout_strides, b, h, D, BULK)
    dout_tile = load_rows(g_rows, g_stride, column, first, last, M, D, WIDTH, True, BULK)  # [M, D]
    q_tile = load_rows(q_rows, q_stride, column, first, last, M, D, WIDTH, True, BULK)  # [M, D]
    product = tl.sum(o_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    tl.store(delta + at, product, mask=live)
    low = load_row(bounds, first, last, M, True)
    high = load_row(bounds + queries, first, last, M, True)
    total = tl.load(lse + at, mask=live, other=0.0) * LOG2E
    factor = scale * LOG2E
    if NORMALIZE:
        norms += tl.cast(sample, tl.int64) * keys
        temperature = tl.load(head_scale + h)
        inverse = inverse_norm(q_tile)
        tl.store(inverses + at, inverse, mask=live)
        if FOLD:
            q_hat = (q_tile.to(tl.float32) * (inverse * temperature * factor)[:, None]).to(q_tile.dtype)
        else:
            q_hat = (q_tile.to(tl.float32) * inverse[:, None]).to(q_tile.dtype)
            factor *= temperature
    else:
        q_hat = q_tile
    acc = tl.zeros([M, WIDTH], tl.float32)
    full, full_end, part, part_end = (
        tl.load(tile + 2),
        tl.load(tile + 3),
        tl.load(tile + 4),
        tl.load(tile + 5),
    )
    if PEEL:
        acc = _gather_queries(
            acc, q_hat, k_rows, k_stride, v_rows, v_stride, column, dout_tile, total, product, norms, low, high,
            factor, full, full_end,
            D, WIDTH, BLOCK, NORMALIZE, INLINE, FOLD, BULK, False, STAGES, SPECIALIZE,
        )  # fmt: skip
    else:
        part, part_end = tl.minimum(full, part), tl.maximum(full_end, part_end)
    acc = _gather_queries(
        acc, q_hat, k_rows, k_stride, v_rows, v_stride, column, dout_tile, total, product, norms, low, high,
        factor, part, part_end,
        D, WIDTH, BLOCK, NORMALIZE, INLINE, FOLD, BULK, True, 1 if PEEL else STAGES, False,
    )  # fmt: skip
    acc *= scale
    if NORMALIZE:
        q_tile = load_rows(q_rows, q_stride, column, first, last, M, D, WIDTH, True, BULK)
        acc, along = through_norm(q_tile, inverse, acc)
        part_of_scale = tl.sum(tl.where(live, along, 0.0), 0)
        tl.store(d_scale + tl.program_id(0), part_of_scale)
        acc *= temperature
    d_rows, d_stride, column = head_of(dq, dq_strides, b, h, D, False)
    store_rows(d_rows, d_stride, first, last, acc, M, D, WIDTH)


@triton.jit
def _gather_keys(
    dk, dv, k, v, q, q_stride, dout, dout_stride, column, lse, delta, inverses, low, high, factor, start, stop,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr,
    BULK: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv [J, D] what the queries `start` to `stop` give; dk times log2(e) where NORMALIZE and FOLD."""
    for first in tl.range(start, stop, BLOCK, num_stages=STAGES, warp_specialize=SPECIALIZE):
        queries = first + tl.arange(0, BLOCK)
        q_block = load_rows(q, q_stride, column, first, stop, BLOCK, D, WIDTH, PART, BULK)  # [M, D]
        total = load_row(lse, first, stop, BLOCK, PART) * LOG2E
        product = load_row(delta, first, stop, BLOCK, PART)
        if NORMALIZE:
            inverse = load_row(inverses, first, stop, BLOCK, PART)
            if FOLD:
                inverse *= factor
            else:
                q_block = (q_block.to(tl.float32) * inverse[:, None]).to(q_block.dtype)
        scores = tl.dot(k, tl.trans(q_block), input_precision="ieee")  # [J, M]
        if NORMALIZE and FOLD:
            scores = scores * inverse[None, :] - total[None, :]
        else:
            scores = scores * factor - total[None, :]
        if PART:
            sees = (queries[None, :] >= low[:, None]) & (queries[None, :] < tl.minimum(high, stop)[:, None])
            scores = tl.where(sees, scores, float("-inf"))
        weights = tl.exp2(scores)
        dout_block = load_rows(dout, dout_stride, column, first, stop, BLOCK, D, WIDTH, PART, BULK)  # [M, D]
        dv = tl.dot(weights.to(dout_block.dtype), dout_block, dv, input_precision="ieee")
        slopes = tl.dot(v, tl.trans(dout_block), input_precision="ieee")  # [J, M]
        if NORMALIZE and FOLD:
            slopes = weights * (slopes * inverse[None, :] - (product * inverse)[None, :])
        else:
            slopes = weights * (slopes - product[None, :])
        dk = tl.dot(slopes.to(q_block.dtype), q_block, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, dout, dk, dv, lse, delta, inverses, head_scale, q_strides, k_strides, v_strides, dout_strides,
    dk_strides, dv_strides, tiles, bounds, count, heads, queries, keys, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    FOLD: tl.constexpr, BULK: tl.constexpr, PEEL: tl.constexpr, STAGES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one head: dk and dv, after `queries_kernel` has written `delta` and `inverses`."""
    tile = tiles + tl.program_id(0) % count * 6
    sample = tl.program_id(0) // count
    b, h = sample // heads, sample % heads
    first, last = tl.load(tile), tl.load(tile + 1)
    q_rows, q_stride, column = head_of(q, q_strides, b, h, D, BULK)
    k_rows, k_stride, column = head_of(k, k_strides, b, h, D, BULK)
    v_rows, v_stride, column = head_of(v, v_strides, b, h, D, BULK)
    g_rows, g_stride, column = head_of(dout, dout_strides, b, h, D, BULK)
    k_tile = load_rows(k_rows, k_stride, column, first, last, J, D, WIDTH, True, BULK)  # [J, D]
    v_tile = load_rows(v_rows, v_stride, column, first, last, J, D, WIDTH, True, BULK)  # [J, D]
    low = load_row(bounds, first, last, J, True)
    high = load_row(bounds + keys, first, last, J, True)
    at = tl.cast(sample, tl.int64) * queries
    factor = scale * LOG2E
    if NORMALIZE:
        factor *= tl.load(head_scale + h)
        inverse = inverse_norm(k_tile)
        k_hat = (k_tile.to(tl.float32) * inverse[:, None]).to(k_tile.dtype)
    else:
        k_hat = k_tile
    d_key = tl.zeros([J, WIDTH], tl.float32)
    d_value = tl.zeros([J, WIDTH], tl.float32)
    full, full_end, part, part_end = (
        tl.load(tile + 2),
        tl.load(tile + 3),
        tl.load(tile + 4),
        tl.load(tile + 5),
    )
    if PEEL:
        d_key, d_value = _gather_keys(
            d_key, d_value, k_hat, v_tile, q_rows, q_stride, g_rows, g_stride, column, lse + at, delta + at,
            inverses + at, low, high, factor, full, full_end,
            D, WIDTH, BLOCK, NORMALIZE, FOLD, BULK, False, STAGES, SPECIALIZE,
        )  # fmt: skip
    else:
        part, part_end = tl.minimum(full, part), tl.maximum(full_end, part_end)
    d_key, d_value = _gather_keys(
        d_key, d_value, k_hat, v_tile, q_rows, q_stride, g_rows, g_stride, column, lse + at, delta + at,
        inverses + at, low, high, factor, part, part_end,
        D, WIDTH, BLOCK, NORMALIZE, FOLD, BULK, True, 1 if PEEL else STAGES, False,
    )  # fmt: skip
    if NORMALIZE:
        d_key *= LN2 if FOLD else factor * LN2
        k_tile = load_rows(k_rows, k_stride, column, first, last, J, D, WIDTH, True, BULK)
        d_key, _ = through_norm(k_tile, inverse, d_key)
    else:
        d_key *= scale
    d_rows, d_stride, column = head_of(dk, dk_strides, b, h, D, False)
    store_rows(d_rows, d_stride, first, last, d_key, J, D, WIDTH)
    d_rows, d_stride, column = head_of(dv, dv_strides, b, h, D, False)
    store_rows(d_rows, d_stride, first, last, d_value, J, D, WIDTH)

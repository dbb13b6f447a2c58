"""Triton: attention over scales, backward: tiles of queries give their gradient, then tiles of keys theirs.

The weights are computed anew from the log-sum-exp of the forward pass: seven matrix products for each block. One pass
with five, which adds a block's share of the queries' gradient to sums in memory, was slower in every case measured.

With q̂ = q / max(|q|, 1e-12), a gradient g of q̂ becomes (g - q̂ (q̂·g)) / |q|; where the norm is clamped, g / 1e-12.
The factor of scores is folded into the scores' gradients where their type has the range for it (FOLD): that of the
queries, f = temperature / |q|, of which dk = sum of (slope f) q needs no normalised copy of q.

Letters: as in `triton_forward`; J are rows where keys are tiles, M columns.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"
# ruff: noqa: SIM108 - Triton compiles the one branch of a constant condition

import triton
import triton.language as tl
from hmar_kernels.triton_forward import (
    LOG2E,
    SIZES,
    block_start,
    head_of,
    inverse_norm,
    load_row,
    load_rows,
    nonzero,
    pitch,
    store_rows,
    tile_columns,
)


@triton.jit
def zero_or_one(head_scale):
    """What undoes `nonzero` where the head scale is a factor."""
    return tl.where(head_scale == 0.0, 0.0, 1.0)


@triton.jit
def through_norm(x, inverse, gradient):
    """The gradient of x [rows, D] from that of x / max(|x|, 1e-12), and their product [rows]."""
    unit = x.to(tl.float32) * inverse[:, None]
    along = tl.sum(unit * gradient, 1)
    kept = tl.where(inverse < 0.999e12, along, 0.0)  # not where clamped
    return (gradient - unit * kept[:, None]) * inverse[:, None], along


@triton.jit
def gather_queries(
    acc, q, k, k_stride, v, v_stride, column, dout, total, product, norms, norms_start, low, high, factor,
    keys, begin, end, whole, whole_end, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, FOLD: tl.constexpr, BULK: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add to acc [M, D] the gradients of scores times the keys `begin` to `end`, normalised if NORMALIZE.

    The norms come from memory: were they computed from the block, Triton 3.6 would give it too few buffers, and
    overwrite it while the last product reads it.
    """
    for block in tl.range(begin, end, BLOCK, num_stages=STAGES):
        first = block_start(block, whole, whole_end, PART)
        k_block = load_rows(k, k_stride, column, first, keys, BLOCK, D, WIDTH, PART, BULK)  # [J, D]
        if NORMALIZE:
            inverse = load_row(norms, norms_start, first, keys, BLOCK, PART, BULK)
            if not FOLD:
                k_block = (k_block.to(tl.float32) * inverse[:, None]).to(k_block.dtype)
        scores = tl.dot(q, tl.trans(k_block), input_precision="ieee")  # [M, J]
        if NORMALIZE and FOLD:
            scores = scores * inverse[None, :] - total[:, None]
        else:
            scores = scores * factor - total[:, None]
        if PART:
            at = first + tl.arange(0, BLOCK)
            sees = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
            scores = tl.where(sees, scores, float("-inf"))
        weights = tl.exp2(scores)
        v_block = load_rows(v, v_stride, column, first, keys, BLOCK, D, WIDTH, PART, BULK)  # [J, D]
        slopes = tl.dot(dout, tl.trans(v_block), input_precision="ieee")  # [M, J]
        slopes = weights * (slopes - product[:, None])
        if NORMALIZE and FOLD:
            slopes = slopes * inverse[None, :]
        acc = tl.dot(slopes.to(k_block.dtype), k_block, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=SIZES)
def queries_kernel(
    q, k, v, dout, norms, out, dq, lse, products, head_scale, d_scale, dq_strides, q_strides, k_strides,
    v_strides, dout_strides, tiles, bounds, count, heads, queries, keys, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    FOLD: tl.constexpr, BULK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first pass, one tile of queries of one head: dq, and what the second needs of the queries.

    That is `products` [B, H, N], output times its gradient, where NORMALIZE and FOLD times the factor of scores.
    Where NORMALIZE, also this tile's part of the gradient of head_scale, to d_scale [B H, T].
    """
    tile = tiles + tl.program_id(0) % count * 6
    sample = tl.program_id(0) // count
    b, h = sample // heads, sample % heads
    first, last = tl.load(tile), tl.load(tile + 1)
    o_source = out + (tl.cast(b, tl.int64) * queries * heads + h) * D
    o_tile = load_rows(o_source, heads * D, 0, first, last, M, D, WIDTH, True, False).to(tl.float32)  # [M, D]
    q_rows, q_stride, own = head_of(q, q_strides, queries, b, h, D, BULK)
    k_rows, k_stride, column = head_of(k, k_strides, keys, b, h, D, BULK)
    v_rows, v_stride, column = head_of(v, v_strides, keys, b, h, D, BULK)
    g_rows, g_stride, own = head_of(dout, dout_strides, queries, b, h, D, BULK)
    dout_tile = load_rows(g_rows, g_stride, own, first, last, M, D, WIDTH, True, BULK)  # [M, D]
    q_tile = load_rows(q_rows, q_stride, own, first, last, M, D, WIDTH, True, BULK)  # [M, D]
    low = load_row(bounds, 0, first, last, M, True, False)
    high = load_row(bounds, queries, first, last, M, True, False)
    start = tl.cast(sample, tl.int64) * pitch(queries)
    total = load_row(lse, start, first, last, M, True, False) * LOG2E
    product = tl.sum(o_tile * dout_tile.to(tl.float32), 1)
    inverse, factor, temperature, q_hat = total, scale * LOG2E, 1.0, q_tile
    if NORMALIZE:
        temperature = tl.load(head_scale + h)
        inverse = inverse_norm(q_tile)
        if FOLD:
            q_hat = (q_tile.to(tl.float32) * (inverse * (temperature * factor))[:, None]).to(q_tile.dtype)
        else:
            q_hat = (q_tile.to(tl.float32) * inverse[:, None]).to(q_tile.dtype)
        factor = factor * temperature
    rows = first + tl.arange(0, M)
    if NORMALIZE and FOLD:
        written = product * (inverse * (scale * LOG2E * nonzero(temperature)))
    else:
        written = product
    tl.store(products + start + rows, written, mask=rows < last)
    acc = tl.zeros([M, WIDTH], tl.float32)
    norms_start = tl.cast(sample, tl.int64) * pitch(keys)
    begin, end, whole, whole_end = tile_columns(tile, BLOCK)
    acc = gather_queries(
        acc, q_hat, k_rows, k_stride, v_rows, v_stride, column, dout_tile, total, product, norms,
        norms_start, low, high, factor, keys, whole, whole_end, whole, whole_end,
        D, WIDTH, BLOCK, NORMALIZE, FOLD, BULK, False, STAGES,
    )  # fmt: skip
    acc = gather_queries(
        acc, q_hat, k_rows, k_stride, v_rows, v_stride, column, dout_tile, total, product, norms,
        norms_start, low, high, factor, keys, begin, end - (whole_end - whole), whole, whole_end,
        D, WIDTH, BLOCK, NORMALIZE, FOLD, BULK, True, STAGES,
    )  # fmt: skip
    acc *= scale
    if NORMALIZE:
        q_tile = load_rows(q_rows, q_stride, own, first, last, M, D, WIDTH, True, BULK)
        acc, along = through_norm(q_tile, inverse, acc)
        tl.store(d_scale + tl.program_id(0), tl.sum(tl.where(rows < last, along, 0.0), 0))
        acc *= temperature
    d_rows, d_stride, column = head_of(dq, dq_strides, queries, b, h, D, False)
    store_rows(d_rows, d_stride, first, last, acc, M, D, WIDTH)


@triton.jit
def gather_keys(
    dk, dv, k, v, q, q_stride, dout, dout_stride, column, lse, products, inverses, start_of_head,
    low, high, factor, queries, begin, end, whole, whole_end,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    FOLD: tl.constexpr, BULK: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv [J, D] what the queries `begin` to `end` give (see `block_start`).

    That to dk is times log2(e) where NORMALIZE and FOLD.
    """
    for block in tl.range(begin, end, BLOCK, num_stages=STAGES):
        first = block_start(block, whole, whole_end, PART)
        q_block = load_rows(q, q_stride, column, first, queries, BLOCK, D, WIDTH, PART, BULK)  # [M, D]
        total = load_row(lse, start_of_head, first, queries, BLOCK, PART, BULK) * LOG2E
        product = load_row(products, start_of_head, first, queries, BLOCK, PART, BULK)
        if NORMALIZE:
            inverse = load_row(inverses, start_of_head, first, queries, BLOCK, PART, BULK)
            if not FOLD:
                q_block = (q_block.to(tl.float32) * inverse[:, None]).to(q_block.dtype)
        scores = tl.dot(k, tl.trans(q_block), input_precision="ieee")  # [J, M]
        if NORMALIZE and FOLD:
            scores = scores * inverse[None, :] - total[None, :]
        else:
            scores = scores * factor - total[None, :]
        if PART:
            at = first + tl.arange(0, BLOCK)
            sees = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
            scores = tl.where(sees, scores, float("-inf"))
        weights = tl.exp2(scores)
        dout_block = load_rows(
            dout, dout_stride, column, first, queries, BLOCK, D, WIDTH, PART, BULK
        )  # [M, D]
        dv = tl.dot(weights.to(dout_block.dtype), dout_block, dv, input_precision="ieee")
        slopes = tl.dot(v, tl.trans(dout_block), input_precision="ieee")  # [J, M]
        if NORMALIZE and FOLD:
            slopes = weights * (slopes * inverse[None, :] - product[None, :])
        else:
            slopes = weights * (slopes - product[None, :])
        dk = tl.dot(slopes.to(q_block.dtype), q_block, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def keys_kernel(
    q, k, v, dout, lse, products, inverses, dk, dv, head_scale, dk_strides, dv_strides, q_strides, k_strides,
    v_strides, dout_strides, tiles, bounds, count, heads, queries, keys, scale, D: tl.constexpr, WIDTH: tl.constexpr,
    J: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr, BULK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The second pass, one tile of keys of one head: dk and dv.

    `products` are those of the first pass; `inverses` [B, H, N], where NORMALIZE, 1 / |query|, where FOLD times the
    factor of scores.
    """
    tile = tiles + tl.program_id(0) % count * 6
    sample = tl.program_id(0) // count
    b, h = sample // heads, sample % heads
    first, last = tl.load(tile), tl.load(tile + 1)
    q_rows, q_stride, column = head_of(q, q_strides, queries, b, h, D, BULK)
    k_rows, k_stride, own = head_of(k, k_strides, keys, b, h, D, BULK)
    v_rows, v_stride, own = head_of(v, v_strides, keys, b, h, D, BULK)
    g_rows, g_stride, column = head_of(dout, dout_strides, queries, b, h, D, BULK)
    k_tile = load_rows(k_rows, k_stride, own, first, last, J, D, WIDTH, True, BULK)  # [J, D]
    v_tile = load_rows(v_rows, v_stride, own, first, last, J, D, WIDTH, True, BULK)  # [J, D]
    low = load_row(bounds, 0, first, last, J, True, False)
    high = load_row(bounds, keys, first, last, J, True, False)
    start = tl.cast(sample, tl.int64) * pitch(queries)
    factor, temperature, k_hat = scale * LOG2E, 1.0, k_tile
    if NORMALIZE:
        temperature = tl.load(head_scale + h)
        factor = factor * temperature
        inverse = inverse_norm(k_tile)
        k_hat = (k_tile.to(tl.float32) * inverse[:, None]).to(k_tile.dtype)
    d_key = tl.zeros([J, WIDTH], tl.float32)
    d_value = tl.zeros([J, WIDTH], tl.float32)
    begin, end, whole, whole_end = tile_columns(tile, BLOCK)
    d_key, d_value = gather_keys(
        d_key, d_value, k_hat, v_tile, q_rows, q_stride, g_rows, g_stride, column, lse, products,
        inverses, start, low, high, factor, queries, whole, whole_end, whole, whole_end,
        D, WIDTH, BLOCK, NORMALIZE, FOLD, BULK, False, STAGES,
    )  # fmt: skip
    d_key, d_value = gather_keys(
        d_key, d_value, k_hat, v_tile, q_rows, q_stride, g_rows, g_stride, column, lse, products,
        inverses, start, low, high, factor, queries, begin, end - (whole_end - whole), whole, whole_end,
        D, WIDTH, BLOCK, NORMALIZE, FOLD, BULK, True, STAGES,
    )  # fmt: skip
    d_rows, d_stride, _ = head_of(dv, dv_strides, keys, b, h, D, False)
    store_rows(d_rows, d_stride, first, last, d_value, J, D, WIDTH)
    if NORMALIZE:
        d_key *= zero_or_one(temperature) * (1 / LOG2E) if FOLD else factor * (1 / LOG2E)
        k_tile = load_rows(k_rows, k_stride, own, first, last, J, D, WIDTH, True, BULK)
        d_key, _ = through_norm(k_tile, inverse, d_key)
    else:
        d_key *= scale
    d_rows, d_stride, _ = head_of(dk, dk_strides, keys, b, h, D, False)
    store_rows(d_rows, d_stride, first, last, d_key, J, D, WIDTH)

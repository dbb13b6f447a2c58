"""Triton: attention over scales, backward: in one pass over tiles of keys, or in two passes.

The weights are computed anew from the log-sum-exp of the forward pass. In two passes, tiles of queries give their
gradient, then tiles of keys theirs: seven matrix products for each block. In one pass, tiles of keys give both, five
products: a block's share of the queries' gradient is added to float32 sums in memory, which the last tile of a head
turns into the gradient. Only a few heads are worked on at a time, so they share a few such sums, which stay in the
chip's cache: tiles are taken in order, and wait until the head that had their sums before is finished.

With q̂ = q / max(|q|, epsilon), a gradient g of q̂ becomes (g - q̂ (q̂·g)) / |q|; where the norm is clamped, g / epsilon.
The factor of scores is folded into the scores' gradients where their type has the range for it (FOLD): that of the
queries, f = temperature / |q|, of which dk = sum of (slope f) q needs no normalised copy of q.

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
    SIZES,
    block_start,
    head_of,
    inverse_norm,
    load_row,
    load_rows,
    nonzero,
    pitch,
    store_rows,
)


@triton.jit
def zero_or_one(head_scale):
    """What undoes `nonzero` where the head scale is a factor."""
    return tl.where(head_scale == 0.0, 0.0, 1.0)


@triton.jit
def through_norm(x, inverse, gradient):
    """The gradient of x [rows, D] from that of x / max(|x|, epsilon), and their product [rows]."""
    unit = x.to(tl.float32) * inverse[:, None]
    along = tl.sum(unit * gradient, 1)
    kept = tl.where(inverse < 0.999 / EPSILON, along, 0.0)
    return (gradient - unit * kept[:, None]) * inverse[:, None], along


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    q, out, dout, products, inverses, head_scale, q_strides, dout_strides, heads, queries, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """What `gather_keys` needs of BLOCK queries of one head, where the backward pass is one.

    To `products` [B, H, N] output times its gradient, to `inverses`, where NORMALIZE, 1 / |q|; where FOLD too, both
    times the factor of scores. Arrays of numbers lie as `pitch` says.
    """
    sample = tl.program_id(0) // tl.cdiv(queries, BLOCK)
    b, h = sample // heads, sample % heads
    first = tl.program_id(0) % tl.cdiv(queries, BLOCK) * BLOCK
    o_source = out + (tl.cast(b, tl.int64) * queries * heads + h) * D
    o = load_rows(o_source, heads * D, 0, first, queries, BLOCK, D, WIDTH, True, False).to(tl.float32)
    source, stride, column = head_of(dout, dout_strides, b, h, D, False)
    g = load_rows(source, stride, column, first, queries, BLOCK, D, WIDTH, True, False).to(tl.float32)
    start = tl.cast(sample, tl.int64) * pitch(queries)
    rows = first + tl.arange(0, BLOCK)
    product = tl.sum(o * g, 1)
    if NORMALIZE:
        source, stride, column = head_of(q, q_strides, b, h, D, False)
        inverse = inverse_norm(
            load_rows(source, stride, column, first, queries, BLOCK, D, WIDTH, True, False)
        )
        if FOLD:
            inverse *= scale * LOG2E * nonzero(tl.load(head_scale + h))
            product *= inverse
        tl.store(inverses + start + rows, inverse, mask=rows < queries)
    tl.store(products + start + rows, product, mask=rows < queries)


@triton.jit
def gather_queries(
    acc, q, k, k_stride, v, v_stride, column, dout, total, product, norms, norms_start, low, high, factor,
    keys, begin, end, whole, whole_end, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, FOLD: tl.constexpr, BULK: tl.constexpr, BULK_ROWS: tl.constexpr, PART: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Add to acc [M, D] the gradients of scores times the keys `begin` to `end`, normalised if NORMALIZE.

    The norms come from memory: were they computed from the block, Triton 3.6 would give it too few buffers, and
    overwrite it while the last product reads it.
    """
    for block in tl.range(begin, end, BLOCK, num_stages=STAGES):
        first = block_start(block, whole, whole_end, PART)
        k_block = load_rows(k, k_stride, column, first, keys, BLOCK, D, WIDTH, PART, BULK)  # [J, D]
        if NORMALIZE:
            inverse = load_row(norms, norms_start, first, keys, BLOCK, PART, BULK_ROWS)
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
    q, k, v, out, dout, dq, lse, products, norms, head_scale, d_scale, q_strides, k_strides, v_strides,
    dout_strides, dq_strides, tiles, bounds, count, heads, queries, keys, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    FOLD: tl.constexpr, BULK: tl.constexpr, BULK_OWN: tl.constexpr, BULK_ROWS: tl.constexpr, PEEL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The first of two passes, one tile of queries of one head: dq, and the products of `statistics_kernel`.

    Where NORMALIZE, also this tile's part of the gradient of head_scale, to d_scale [B H, T].
    """
    tile = tiles + tl.program_id(0) % count * 6
    sample = tl.program_id(0) // count
    b, h = sample // heads, sample % heads
    first, last = tl.load(tile), tl.load(tile + 1)
    o_source = out + (tl.cast(b, tl.int64) * queries * heads + h) * D
    o_tile = load_rows(o_source, heads * D, 0, first, last, M, D, WIDTH, True, False).to(tl.float32)  # [M, D]
    q_rows, q_stride, own = head_of(q, q_strides, b, h, D, BULK_OWN)
    k_rows, k_stride, column = head_of(k, k_strides, b, h, D, BULK)
    v_rows, v_stride, column = head_of(v, v_strides, b, h, D, BULK)
    g_rows, g_stride, own = head_of(dout, dout_strides, b, h, D, BULK_OWN)
    dout_tile = load_rows(g_rows, g_stride, own, first, last, M, D, WIDTH, True, BULK_OWN)  # [M, D]
    q_tile = load_rows(q_rows, q_stride, own, first, last, M, D, WIDTH, True, BULK_OWN)  # [M, D]
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
    begin, blocks, whole, whole_end = (
        tl.load(tile + 2),
        tl.load(tile + 3) * BLOCK,
        tl.load(tile + 4) * BLOCK,
        tl.load(tile + 5) * BLOCK,
    )
    end, whole, whole_end = begin + blocks, begin + whole, begin + whole_end
    if PEEL:
        acc = gather_queries(
            acc, q_hat, k_rows, k_stride, v_rows, v_stride, column, dout_tile, total, product, norms,
            norms_start, low, high, factor, keys, whole, whole_end, whole, whole_end,
            D, WIDTH, BLOCK, NORMALIZE, FOLD, BULK, BULK_ROWS, False, STAGES,
        )  # fmt: skip
    else:
        whole, whole_end = begin, begin
    acc = gather_queries(
        acc, q_hat, k_rows, k_stride, v_rows, v_stride, column, dout_tile, total, product, norms,
        norms_start, low, high, factor, keys, begin, end - (whole_end - whole), whole, whole_end,
        D, WIDTH, BLOCK, NORMALIZE, FOLD, BULK, BULK_ROWS, True, STAGES,
    )  # fmt: skip
    acc *= scale
    if NORMALIZE:
        q_tile = load_rows(q_rows, q_stride, own, first, last, M, D, WIDTH, True, BULK_OWN)
        acc, along = through_norm(q_tile, inverse, acc)
        tl.store(d_scale + tl.program_id(0), tl.sum(tl.where(rows < last, along, 0.0), 0))
        acc *= temperature
    d_rows, d_stride, column = head_of(dq, dq_strides, b, h, D, False)
    store_rows(d_rows, d_stride, first, last, acc, M, D, WIDTH)


@triton.jit
def gather_keys(
    dk, dv, sums, k, v, q, q_stride, dout, dout_stride, column, lse, products, inverses, start_of_head,
    low, high, factor, queries, begin, end, whole, whole_end,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    FOLD: tl.constexpr, BULK: tl.constexpr, BULK_ROWS: tl.constexpr, PART: tl.constexpr, FUSED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv [J, D] what the queries `begin` to `end` give (see `block_start`).

    That to dk is times log2(e) where NORMALIZE and FOLD. Where FUSED, add the gradients of scores times keys to the
    rows of `sums` [N, D], without that factor.
    """
    for block in tl.range(begin, end, BLOCK, num_stages=STAGES):
        first = block_start(block, whole, whole_end, PART)
        at = first + tl.arange(0, BLOCK)
        q_block = load_rows(q, q_stride, column, first, queries, BLOCK, D, WIDTH, PART, BULK)  # [M, D]
        total = load_row(lse, start_of_head, first, queries, BLOCK, PART, BULK_ROWS) * LOG2E
        product = load_row(products, start_of_head, first, queries, BLOCK, PART, BULK_ROWS)
        if NORMALIZE:
            inverse = load_row(inverses, start_of_head, first, queries, BLOCK, PART, BULK_ROWS)
            if not FOLD:
                q_block = (q_block.to(tl.float32) * inverse[:, None]).to(q_block.dtype)
        scores = tl.dot(k, tl.trans(q_block), input_precision="ieee")  # [J, M]
        if NORMALIZE and FOLD:
            scores = scores * inverse[None, :] - total[None, :]
        else:
            scores = scores * factor - total[None, :]
        if PART:
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
        narrow = slopes.to(q_block.dtype)
        dk = tl.dot(narrow, q_block, dk, input_precision="ieee")
        if FUSED:
            columns = tl.arange(0, WIDTH)
            share = tl.dot(tl.trans(narrow), k, input_precision="ieee")  # [M, D]
            inside = (at < queries)[:, None] & (columns < D)[None, :]
            pointers = sums + at[:, None] * D + columns[None, :]
            if PART or D < WIDTH:
                tl.atomic_add(pointers, share, mask=inside, sem="relaxed")
            else:
                tl.atomic_add(pointers, share, sem="relaxed")
    return dk, dv


@triton.jit
def finish_queries(
    dq, dq_stride, d_scale, sums, q, q_stride, column, head_scale, queries, scale, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Turn the complete `sums` [N, D] of a head into dq and a part of the head scale's gradient; clear them."""
    columns = tl.arange(0, WIDTH)
    part_of_scale = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, queries, BLOCK, num_stages=1):
        rows = first + tl.arange(0, BLOCK)
        inside = (rows < queries)[:, None] & (columns < D)[None, :]
        pointers = sums + rows[:, None] * D + columns[None, :]
        gradient = tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(pointers, tl.zeros([BLOCK, WIDTH], tl.float32), mask=inside)
        if NORMALIZE:
            q_block = load_rows(q, q_stride, column, first, queries, BLOCK, D, WIDTH, True, BULK)
            inverse = inverse_norm(q_block)
            if FOLD:  # the sums are of the gradient of q̂ times log2(e) / |q|
                gradient *= LN2 / inverse[:, None]
                gradient, along = through_norm(q_block, inverse, gradient)
                along = along / nonzero(head_scale)
                gradient *= zero_or_one(head_scale)
            else:
                gradient, along = through_norm(q_block, inverse, gradient * scale)
                gradient *= head_scale
            part_of_scale += tl.where(rows < queries, along, 0.0)
        else:
            gradient *= scale
        store_rows(dq, dq_stride, first, queries, gradient, BLOCK, D, WIDTH)
    if NORMALIZE:
        tl.store(d_scale, tl.sum(part_of_scale, 0))


@triton.jit(do_not_specialize=SIZES)
def keys_kernel(
    q, k, v, dout, dq, dk, dv, lse, products, inverses, head_scale, d_scale, sums, state, slots, q_strides,
    k_strides, v_strides, dout_strides, dq_strides, dk_strides, dv_strides, tiles, bounds, count, heads,
    queries, keys, scale, D: tl.constexpr, WIDTH: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, FOLD: tl.constexpr, BULK: tl.constexpr, BULK_OWN: tl.constexpr, BULK_ROWS: tl.constexpr,
    PEEL: tl.constexpr, FUSED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one head: dk and dv from the statistics of the queries.

    Where FUSED, also dq and a part of head_scale's gradient, d_scale [B H], by the sums [slots, N, D] and a state
    [1 + 2 slots], zero at first: the tiles taken; for each slot the tiles that are done, and the heads.
    """
    if FUSED:
        ticket = tl.atomic_add(state, 1, sem="relaxed")
    else:
        ticket = tl.program_id(0)
    tile = tiles + ticket % count * 6
    sample = ticket // count
    b, h = sample // heads, sample % heads
    first, last = tl.load(tile), tl.load(tile + 1)
    q_rows, q_stride, column = head_of(q, q_strides, b, h, D, BULK)
    k_rows, k_stride, own = head_of(k, k_strides, b, h, D, BULK_OWN)
    v_rows, v_stride, own = head_of(v, v_strides, b, h, D, BULK_OWN)
    g_rows, g_stride, column = head_of(dout, dout_strides, b, h, D, BULK)
    k_tile = load_rows(k_rows, k_stride, own, first, last, J, D, WIDTH, True, BULK_OWN)  # [J, D]
    v_tile = load_rows(v_rows, v_stride, own, first, last, J, D, WIDTH, True, BULK_OWN)  # [J, D]
    low = load_row(bounds, 0, first, last, J, True, False)
    high = load_row(bounds, keys, first, last, J, True, False)
    start = tl.cast(sample, tl.int64) * pitch(queries)
    factor, temperature, k_hat = scale * LOG2E, 1.0, k_tile
    if NORMALIZE:
        temperature = tl.load(head_scale + h)
        factor = factor * temperature
        inverse = inverse_norm(k_tile)
        k_hat = (k_tile.to(tl.float32) * inverse[:, None]).to(k_tile.dtype)
    slot = state
    if FUSED:
        slot = state + 1 + sample % slots * 2
        sums += tl.cast(sample % slots, tl.int64) * queries * D
        while tl.atomic_add(slot + 1, 0, sem="acquire") < sample // slots:
            pass
    d_key = tl.zeros([J, WIDTH], tl.float32)
    d_value = tl.zeros([J, WIDTH], tl.float32)
    begin, blocks, whole, whole_end = (
        tl.load(tile + 2),
        tl.load(tile + 3) * BLOCK,
        tl.load(tile + 4) * BLOCK,
        tl.load(tile + 5) * BLOCK,
    )
    end, whole, whole_end = begin + blocks, begin + whole, begin + whole_end
    if PEEL:
        d_key, d_value = gather_keys(
            d_key, d_value, sums, k_hat, v_tile, q_rows, q_stride, g_rows, g_stride, column, lse, products,
            inverses, start, low, high, factor, queries, whole, whole_end, whole, whole_end,
            D, WIDTH, BLOCK, NORMALIZE, FOLD, BULK, BULK_ROWS, False, FUSED, STAGES,
        )  # fmt: skip
    else:
        whole, whole_end = begin, begin
    d_key, d_value = gather_keys(
        d_key, d_value, sums, k_hat, v_tile, q_rows, q_stride, g_rows, g_stride, column, lse, products,
        inverses, start, low, high, factor, queries, begin, end - (whole_end - whole), whole, whole_end,
        D, WIDTH, BLOCK, NORMALIZE, FOLD, BULK, BULK_ROWS, True, FUSED, STAGES,
    )  # fmt: skip
    d_rows, d_stride, _ = head_of(dv, dv_strides, b, h, D, False)
    store_rows(d_rows, d_stride, first, last, d_value, J, D, WIDTH)
    if NORMALIZE:
        d_key *= LN2 * zero_or_one(temperature) if FOLD else factor * LN2
        k_tile = load_rows(k_rows, k_stride, own, first, last, J, D, WIDTH, True, BULK_OWN)
        d_key, _ = through_norm(k_tile, inverse, d_key)
    else:
        d_key *= scale
    d_rows, d_stride, _ = head_of(dk, dk_strides, b, h, D, False)
    store_rows(d_rows, d_stride, first, last, d_key, J, D, WIDTH)
    if FUSED:
        tl.debug_barrier()  # this program's additions come before its mark
        if tl.atomic_add(slot, 1, sem="acq_rel") % count == count - 1:
            d_rows, d_stride, _ = head_of(dq, dq_strides, b, h, D, False)
            finish_queries(
                d_rows, d_stride, d_scale + sample, sums, q_rows, q_stride, column, temperature, queries, scale,
                D, WIDTH, BLOCK, NORMALIZE, FOLD, BULK,
            )  # fmt: skip
            tl.debug_barrier()
            tl.atomic_add(slot + 1, 1, sem="release")

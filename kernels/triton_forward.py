"""Triton: attention over scales, forward, and the norms of keys.

Every program works on one tile of the schedule (`hmar_kernels.tiles`) for one head of one sample: a few neighbouring
queries with all the keys that any of them sees. Scores are in units of log 2, since exp2 is what the chip computes.

Blocks that all queries of a tile see come last, and with the maximum of what came before in place of a running one:
nothing is rescaled then. A float has room for scores far above it; a tile whose sums have left that room is computed
again, with a running maximum throughout. Normalised scores have a bound, which takes the maximum's place from the
first block on; a tile that has a row far below it is computed again, too. Float16 has no such room: its maximum runs.

Letters: B batch, L keys, N queries, H heads, D head size, M queries of a tile, J keys of a block.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"
# ruff: noqa: SIM108 - Triton compiles the one branch of a constant condition

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SIZES = ["count", "heads", "queries", "keys"]
"""Arguments whose values never make a kernel of their own."""


@triton.jit
def load_rows(
    source, stride, column, first, last, BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CHECK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """[BLOCK, WIDTH]: rows from `first` on; zeros from row `last` on where CHECK, and beyond column D.

    `source` points to row 0 and `stride` is between rows; where BULK, `source` is a tensor descriptor, `stride` the
    number of its row that is our row 0, and `column` its column.
    """
    if BULK:
        x = source.load([stride + first, column])
    else:
        rows = tl.arange(0, BLOCK)
        columns = tl.arange(0, WIDTH)
        pointers = source + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
        if CHECK and D < WIDTH:
            x = tl.load(pointers, mask=(first + rows < last)[:, None] & (columns < D)[None, :], other=0.0)
        elif CHECK:
            x = tl.load(pointers, mask=(first + rows < last)[:, None], other=0.0)
        elif D < WIDTH:
            x = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
        else:
            x = tl.load(pointers)
    return x


@triton.jit
def load_row(source, start, first, last, BLOCK: tl.constexpr, CHECK: tl.constexpr, BULK: tl.constexpr):
    """[BLOCK] numbers from `start` + `first` on; 0 from `last` on where CHECK.

    `source` points to the array's beginning, or is its descriptor where BULK: then `start` + `first` is a multiple of
    4, as bulk copies need it.
    """
    at = first + tl.arange(0, BLOCK)
    if BULK:
        x = source.load([tl.cast(start + first, tl.int32)])
        if CHECK:
            x = tl.where(at < last, x, 0.0)
    elif CHECK:
        x = tl.load(source + start + at, mask=at < last, other=0)
    else:
        x = tl.load(source + start + at)
    return x


@triton.jit
def pitch(length):
    """Numbers from one head to the next in arrays of a number for each token: bulk copies begin at 16 bytes."""
    return (length + 3) // 4 * 4


@triton.jit
def block_start(column, whole, whole_end, PART: tl.constexpr):
    """First column of a block, where PART counted without the columns `whole` to `whole_end`."""
    if PART:
        column += tl.where(column < whole, 0, whole_end - whole)
    return column


@triton.jit
def store_rows(
    target, stride, first, last, values, BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):
    """Write rows `first` to `last` of [BLOCK, WIDTH] `values`, columns up to D; `target` points to row 0."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    pointers = target + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    mask = (first + rows < last)[:, None]
    if D < WIDTH:
        mask = mask & (columns < D)[None, :]
    tl.store(pointers, values.to(target.dtype.element_ty), mask=mask)


@triton.jit
def head_of(source, strides, length, b, h, D: tl.constexpr, BULK: tl.constexpr):
    """What `load_rows` needs for head h of sample b: source, stride, column. Descriptors have no `strides`."""
    if BULK:
        return source, b * length, h * D
    else:  # noqa: RET505 - a constant branch: the two return different types
        start = tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[2]
        return source + start, strides[1], 0


@triton.jit
def inverse_norm(x):
    """[rows]: 1 / max(|row|, 1e-12) of [rows, D], as torch.nn.functional.normalize has it."""
    wide = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)


@triton.jit
def nonzero(head_scale):
    """The head scale, or something tiny instead of zero: its gradient is found by dividing by it."""
    return tl.where(head_scale == 0.0, 1e-30, head_scale)


@triton.jit(do_not_specialize=SIZES)
def norms_kernel(
    x, norms, head_scale, strides, heads, keys, factor, D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Write `factor` / |row| of rows of x [B, L, H, D] to `norms` [B, H, L]; times the head scale where SCALED.

    A program takes neighbouring heads of a few tokens, which are one stretch of memory.
    """
    groups = tl.cdiv(heads, HEADS)
    place = tl.program_id(0) // groups
    b = place // tl.cdiv(keys, TOKENS)
    rows = tl.arange(0, HEADS * TOKENS)
    h = tl.program_id(0) % groups * HEADS + rows // TOKENS
    at = place % tl.cdiv(keys, TOKENS) * TOKENS + rows % TOKENS
    inside = (h < heads) & (at < keys)
    columns = tl.arange(0, WIDTH)
    pointers = x + tl.cast(b, tl.int64) * strides[0] + columns[None, :]
    pointers += (tl.cast(at, tl.int64) * strides[1] + tl.cast(h, tl.int64) * strides[2])[:, None]
    inverse = (
        inverse_norm(tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)) * factor
    )
    if SCALED:
        inverse *= nonzero(tl.load(head_scale + h, mask=inside, other=1.0))
    tl.store(norms + tl.cast(b * heads + h, tl.int64) * pitch(keys) + at, inverse, mask=inside)


@triton.jit
def tile_columns(tile, BLOCK: tl.constexpr):
    """Of a tile's columns the first, the end, and those that all of its rows see: `whole` to `whole_end`."""
    start = tl.load(tile + 2)
    end = start + tl.load(tile + 3) * BLOCK
    return start, end, start + tl.load(tile + 4) * BLOCK, start + tl.load(tile + 5) * BLOCK


@triton.jit
def _attend(
    acc, total, top, q, k, k_stride, v, v_stride, column, norms, norms_start, low, high, factor, keys,
    begin, end, whole, whole_end,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, INLINE: tl.constexpr,
    BULK: tl.constexpr, PART: tl.constexpr, STEADY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Let queries q [M, D] attend to the keys `begin` to `end` (see `block_start`), each in its bounds where PART.

    Returns the sums of values [M, D] and of weights [M], and what they are relative to, `top` [M]: the maximum so
    far, or where STEADY, what it was before.
    """
    for block in tl.range(begin, end, BLOCK, num_stages=STAGES):
        first = block_start(block, whole, whole_end, PART)
        k_block = load_rows(k, k_stride, column, first, keys, BLOCK, D, WIDTH, PART, BULK)  # [J, D]
        scores = tl.dot(q, tl.trans(k_block), input_precision="ieee")  # [M, J]
        if NORMALIZE:
            if INLINE:
                inverse = inverse_norm(k_block)
            else:
                inverse = load_row(norms, norms_start, first, keys, BLOCK, PART, BULK)
            if STEADY:
                scores = scores * inverse[None, :] - top[:, None]
            else:
                scores = scores * inverse[None, :]
        elif STEADY:
            scores = scores * factor - top[:, None]
        if PART:
            at = first + tl.arange(0, BLOCK)
            sees = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
            scores = tl.where(sees, scores, float("-inf"))
        if STEADY:
            weights = tl.exp2(scores)
        else:
            new_top = tl.maximum(top, tl.max(scores, 1) * factor)
            weights = tl.exp2(scores * factor - new_top[:, None])
            correction = tl.exp2(top - new_top)
            total = total * correction
            acc = acc * correction[:, None]
            top = new_top
        total += tl.sum(weights, 1)
        v_block = load_rows(v, v_stride, column, first, keys, BLOCK, D, WIDTH, PART, BULK)  # [J, D]
        acc = tl.dot(weights.to(v_block.dtype), v_block, acc, input_precision="ieee")
    return acc, total, top


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, norms, out, lse, head_scale, q_strides, k_strides, v_strides, tiles, bounds, count, heads,
    queries, keys, scale, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, INLINE: tl.constexpr, BULK: tl.constexpr, STEADY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of one head: out [B, N, H, D] and lse [B, H, N] from q, k and v of any strides (of B, L and H).

    Arrays of numbers lie as `pitch` says, lse with zeros between heads. Where NORMALIZE, `norms` [B, H, L] holds
    1 / |key| unless INLINE; else `scale` is not negative.
    """
    LOWEST: tl.constexpr = -1e30  # stands for the maximum of no score at all: no infinity minus infinity
    LARGEST: tl.constexpr = 2.0**64  # sum relative to an early maximum that leaves room for sums of values
    SMALLEST: tl.constexpr = 2.0**-80  # sum relative to a bound of which no large part was lost below
    tile = tiles + tl.program_id(0) % count * 6
    sample = tl.program_id(0) // count
    b, h = sample // heads, sample % heads
    first, last = tl.load(tile), tl.load(tile + 1)
    rows = first + tl.arange(0, M)
    q_rows, q_stride, q_column = head_of(q, q_strides, queries, b, h, D, BULK)
    k_rows, k_stride, column = head_of(k, k_strides, keys, b, h, D, BULK)
    v_rows, v_stride, column = head_of(v, v_strides, keys, b, h, D, BULK)
    q_tile = load_rows(q_rows, q_stride, q_column, first, last, M, D, WIDTH, True, BULK)  # [M, D]
    low = load_row(bounds, 0, first, last, M, True, False)
    high = load_row(bounds, queries, first, last, M, True, False)
    norms_start = tl.cast(sample, tl.int64) * pitch(keys)
    factor = scale * LOG2E
    if NORMALIZE:
        temperature = tl.load(head_scale + h) * factor
        q_tile = (q_tile.to(tl.float32) * (inverse_norm(q_tile) * temperature)[:, None]).to(q_tile.dtype)
        factor = 1.0
    start, end, whole, whole_end = tile_columns(tile, BLOCK)
    acc = tl.zeros([M, WIDTH], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.zeros([M], tl.float32)
    again = 1
    # weights relative to `top` are at most 2^64, times 2^(temperature / 512) where queries are rounded to bfloat16
    if NORMALIZE and STEADY:
        top += tl.maximum(tl.abs(temperature) - 64.0, 0.0)
        acc, total, top = _attend(
            acc, total, top, q_tile, k_rows, k_stride, v_rows, v_stride, column, norms, norms_start, low, high,
            factor, keys, start, end - (whole_end - whole), whole, whole_end,
            D, WIDTH, BLOCK, NORMALIZE, INLINE, BULK, True, True, STAGES,
        )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, q_tile, k_rows, k_stride, v_rows, v_stride, column, norms, norms_start, low, high,
            factor, keys, whole, whole_end, whole, whole_end,
            D, WIDTH, BLOCK, NORMALIZE, INLINE, BULK, False, True, STAGES,
        )  # fmt: skip
        again = tl.where(tl.min(tl.where(rows < last, total, 1.0), 0) < SMALLEST, 1, 0)
        whole = whole_end
    else:
        whole = tl.minimum(whole + BLOCK, whole_end)  # the first gives every row a maximum to start with
    while again > 0:
        acc = tl.zeros([M, WIDTH], tl.float32)
        total = tl.zeros([M], tl.float32)
        top = tl.where(rows < last, LOWEST, -LOWEST)
        acc, total, top = _attend(
            acc, total, top, q_tile, k_rows, k_stride, v_rows, v_stride, column, norms, norms_start, low, high,
            factor, keys, start, end - (whole_end - whole), whole, whole_end,
            D, WIDTH, BLOCK, NORMALIZE, INLINE, BULK, True, False, STAGES,
        )  # fmt: skip
        if not (NORMALIZE and STEADY):
            acc, total, top = _attend(
                acc, total, top, q_tile, k_rows, k_stride, v_rows, v_stride, column, norms, norms_start, low, high,
                factor, keys, whole, whole_end, whole, whole_end,
                D, WIDTH, BLOCK, NORMALIZE, INLINE, BULK, False, STEADY, STAGES,
            )  # fmt: skip
        again = tl.where((tl.max(total, 0) > LARGEST) & (whole < whole_end), 1, 0)
        whole = whole_end
    total = tl.where(rows < last, total, 1.0)
    lse += tl.cast(sample, tl.int64) * pitch(queries)
    tl.store(lse + rows, (top + tl.log2(total)) * (1 / LOG2E), mask=rows < last)
    rest = last + tl.arange(0, 4)
    tl.store(lse + rest, 0.0, mask=(rest >= queries) & (rest < pitch(queries)))
    out += (tl.cast(b, tl.int64) * queries * heads + h) * D
    store_rows(out, heads * D, first, last, acc / total[:, None], M, D, WIDTH)

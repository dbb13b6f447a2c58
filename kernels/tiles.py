"""The schedule of tiles: which rows meet which columns, worked out on the host once for each list of scales.

A tile is a few neighbouring rows together with the columns that any of them sees. Rows are queries and columns keys
in the forward pass; in the backward pass also the other way round. Small scales share a tile.

Letters: L keys, N queries, n_k tokens of scale k, T tiles, R rows.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

START = 1.0
"""What a tile costs beside its blocks, in blocks: it begins and ends, whatever it holds."""


class Span(NamedTuple):
    """Neighbouring rows `first` to `last` that see the same columns, `low` to `high` (ends excluded)."""

    first: int
    last: int
    low: int
    high: int


class Tile(NamedTuple):
    """Rows `first` to `last`, and their columns in `blocks` blocks from `start` on (ends excluded).

    All rows see all columns of the blocks `whole` to `whole_end`. In the other blocks each row has its own bounds.
    """

    first: int
    last: int
    start: int
    blocks: int
    whole: int
    whole_end: int


class Schedule(NamedTuple):
    """The tiles of one sequence and the bounds of its rows.

    Attributes:
        tiles: [T, 6] int32, the fields of `Tile`, the most expensive first.
        bounds: [2, R] int32, the first column that a row sees, and the one after the last.
        size: T.
    """

    tiles: Tensor
    bounds: Tensor
    size: int


def query_spans(lengths: Sequence[int], queries: int, causal: bool) -> list[Span]:
    """Which keys the queries of each scale see. The queries are the last of the sequence, whole scales."""
    spans, start, missing = [], 0, sum(lengths) - queries
    for length in lengths:
        stop = start + length
        if start >= missing:
            spans.append(Span(start - missing, stop - missing, 0 if causal else start, stop))
        start = stop
    return spans


def key_spans(lengths: Sequence[int], queries: int, causal: bool) -> list[Span]:
    """Which queries see the keys of each scale."""
    spans, start, missing = [], 0, sum(lengths) - queries
    for length in lengths:
        stop = start + length
        low, high = max(start - missing, 0), max((queries if causal else stop - missing), 0)
        spans.append(Span(start, stop, low, high) if low < high else Span(start, stop, 0, 0))
        start = stop
    return spans


def _tile(first: int, last: int, spans: Sequence[Span], block: int, align: int) -> Tile:
    """Rows `first` to `last` with their columns."""
    seen = [s for s in spans if s.first < last and first < s.last and s.low < s.high]
    if not seen:
        return Tile(first, last, 0, 0, 0, 0)
    start = min(s.low for s in seen) // align * align
    count = -(-(max(s.high for s in seen) - start) // block)
    whole = -(-(max(s.low for s in seen) - start) // block)
    whole_end = (min(s.high for s in seen) - start) // block
    blind = any(s.low >= s.high for s in spans if s.first < last and first < s.last)
    if blind or whole >= whole_end:
        whole = whole_end = 0
    return Tile(first, last, start, count, whole, whole_end)


def cut(spans: Sequence[Span], rows: int, block: int, align: int = 1) -> list[Tile]:
    """Cut all rows into tiles of at most `rows` rows at the least total cost, the most expensive tile first.

    A tile ends where it is full or where a span ends; all such cuts are compared, from the last row backwards.
    Blocks start at multiples of `align`, which bulk copies of numbers need: 16 bytes.
    """
    end = spans[-1].last
    stops = [s.last for s in spans]

    def ends(first: int) -> list[int]:
        return sorted({min(first + rows, end), *(stop for stop in stops if first < stop <= first + rows)})

    reached, order = {0}, [0]
    for first in order:
        for last in ends(first):
            if last < end and last not in reached:
                reached.add(last)
                order.append(last)
    best: dict[int, tuple[float, Tile | None]] = {end: (0.0, None)}
    for first in sorted(reached, reverse=True):
        choices = []
        for last in ends(first):
            tile = _tile(first, last, spans, block, align)
            choices.append((START + tile.blocks + best[last][0], tile))
        best[first] = min(choices, key=lambda choice: (choice[0], -choice[1].last))
    tiles, first = [], 0
    while (tile_at := best[first][1]) is not None:
        tiles.append(tile_at)
        first = tile_at.last
    return sorted(tiles, key=lambda tile: -tile.blocks)


@cache
def schedule(
    lengths: tuple[int, ...],
    queries: int,
    causal: bool,
    by_keys: bool,
    rows: int,
    block: int,
    align: int,
) -> Schedule:
    """The tiles for one sequence.

    Args:
        lengths: tokens n_k of each scale.
        queries: N, the last tokens of the sequence.
        causal: scales see earlier scales.
        by_keys: rows are keys, columns queries.
        rows: rows of a tile.
        block: columns of a block.
        align: see `cut`.
    """
    spans = (key_spans if by_keys else query_spans)(lengths, queries, causal)
    tiles = cut(spans, rows, block, align)
    repeats = torch.tensor([s.last - s.first for s in spans])
    bounds = torch.tensor([[s.low for s in spans], [s.high for s in spans]], dtype=torch.int32)
    each = bounds.repeat_interleave(repeats, dim=1).contiguous()
    return Schedule(torch.tensor(tiles, dtype=torch.int32), each, len(tiles))

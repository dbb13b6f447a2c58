"""The schedule of tiles: every row once, every pair of row and column that see each other, and no other pair."""

import itertools

import pytest
import torch
from budget import visible
from hmar_kernels.tiles import Span, cut, key_spans, query_spans, schedule

CPU = torch.device("cpu")
LENGTHS = [(1,), (5,), (1, 1, 1), (1, 4, 9, 16), (3, 40, 2, 70), (64, 64), (7, 33, 1)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("by_keys", [True, False])
def test_tiles_cover_what_is_seen(lengths: tuple[int, ...], causal: bool, by_keys: bool) -> None:
    shapes = [(16, 16), (32, 8), (8, 32)]
    for (rows, block), skipped, align in itertools.product(shapes, {0, len(lengths) - 1}, (1, 4)):
        queries = sum(lengths[skipped:])
        sees = visible(lengths, causal, queries, CPU)
        sees = sees.T if by_keys else sees
        plan = schedule(lengths, queries, causal, by_keys, rows, block, align)
        low, high = plan.bounds[:, :, None]
        columns = torch.arange(sees.shape[1])
        assert torch.equal((low <= columns) & (columns < high), sees)
        covered = torch.zeros_like(sees, dtype=torch.int)
        taken = torch.zeros(len(sees), dtype=torch.int)
        for first, last, start, count, whole, whole_end in plan.tiles.tolist():
            assert 0 < last - first <= rows
            taken[first:last] += 1
            assert start % align == 0
            for index in range(count):
                at = slice(start + index * block, start + (index + 1) * block)
                if whole <= index < whole_end:
                    assert at.stop <= sees.shape[1] and sees[first:last, at].all(), (
                        "whole blocks need no mask"
                    )
                covered[first:last, at] += sees[first:last, at].int()
        assert torch.equal(taken, torch.ones_like(taken))
        assert torch.equal(covered, sees.int())


def test_expensive_tiles_come_first() -> None:
    costs = [tile.blocks for tile in cut(query_spans((1, 4, 9, 64, 100), 178, True), 32, 16)]
    assert costs == sorted(costs, reverse=True)


def test_small_scales_share_a_tile() -> None:
    """1 + 4 + 9 + 16 + 25 rows fit into one tile; scales of their own would take five."""
    tiles = cut(query_spans((1, 4, 9, 16, 25), 55, False), 64, 64)
    assert [(t.first, t.last) for t in tiles] == [(0, 55)]


def test_a_tile_ends_where_it_saves_work() -> None:
    """One row of the next scale would bring all of its columns with it."""
    tiles = cut(query_spans((63, 1000), 1063, False), 64, 64)
    assert (0, 63) in [(t.first, t.last) for t in tiles]


def test_keys_that_no_query_sees() -> None:
    """Of a cache, where the pattern is diagonal: their tiles have no columns."""
    spans = key_spans((16, 9), 9, False)
    assert spans == [Span(0, 16, 0, 0), Span(16, 25, 0, 9)]
    assert [tile.blocks for tile in cut(spans, 8, 8)] == [2, 2, 0, 0]


def test_a_schedule_is_made_once() -> None:
    first, second = (schedule((1, 4), 5, True, False, 16, 16, 1) for _ in range(2))
    assert first.tiles is second.tiles

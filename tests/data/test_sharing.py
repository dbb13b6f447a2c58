"""Processes share the batches of a source."""

import pytest
from toy_runs import run_two

from hmar_cli.data.images import Example
from hmar_cli.data.sharing import _share_of, gather, once, own_share, shared_batches
from hmar_cli.data.sources import open_source


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_batch_is_that_of_a_single_process(world: int, workers: int) -> None:
    source = open_source("builtin:shapes?count=11", size=16)

    def place(example: Example) -> int:
        return example.index

    def batches(rank: int, of: int) -> list[list[int]]:
        found = shared_batches(source, place, title="", batch_size=3, workers=workers, share=(rank, of))
        return list(found)

    whole = batches(0, 1)
    assert whole == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    for rank in range(world):
        assert batches(rank, world) == whole[rank::world]
        assert sum(map(len, whole[rank::world])) == _share_of(11, 3, (rank, world))


def test_the_first_images_alone() -> None:
    source = open_source("builtin:shapes?count=11", size=16)
    found = shared_batches(source, lambda example: example.index, title="", count=4, batch_size=3)
    assert list(found) == [[0, 1, 2], [3]]


def test_a_process_alone_does_all() -> None:
    assert own_share() == (0, 1)
    assert gather("mine") == ["mine"] and once(lambda: "mine") == "mine"


WORKER = """
from hmar_cli.data.sharing import once
print(once(lambda: print("made") or f"by {rank}"))
"""


def test_what_one_process_makes_all_have() -> None:
    printed = run_two(WORKER)
    assert [lines.count("made") for lines in printed] == [1, 0]
    assert all("by 0" in lines for lines in printed)

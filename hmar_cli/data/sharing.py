"""Going through a source once, a batch at a time: threads decode, and several processes share the batches.

Batch b is that of process b modulo their number, so that every batch holds the images that a single process would put
into it.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from typing import Any, TypeVar

from torch import distributed

from hmar_cli.console import Bar, progress
from hmar_cli.data.ahead import ordered_map
from hmar_cli.data.images import Example, ImageSource

Share = tuple[int, int]
"""This process, from 0, and how many there are."""

Made = TypeVar("Made")


def own_share() -> Share:
    """This process's share of what the processes of `torch.distributed` do; without them it does all."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather(mine: Made) -> list[Made]:
    """What each process of `torch.distributed` has, in their order, in every one of them."""
    _, world = own_share()
    if world == 1:
        return [mine]
    found: list[Any] = [None] * world
    distributed.all_gather_object(found, mine)
    return found


def once(make: Callable[[], Made]) -> Made:
    """What the first process of `torch.distributed` makes, in every one of them."""
    rank, world = own_share()
    if world == 1:
        return make()
    made: list[Any] = [None if rank else make()]
    distributed.broadcast_object_list(made, src=0)
    found: Made = made[0]
    return found


def shared_batches(
    source: ImageSource,
    work: Callable[[Example], Made],
    *,
    title: str,
    count: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    share: Share = (0, 1),
) -> Generator[list[Made], None, None]:
    """Yield this process's batches of a source; the first process shows a bar.

    Args:
        source: the images; a stream is fine.
        work: what is done to each image, in any thread.
        title: of the bar.
        count: of the first images; 0 is all.
        batch_size: images at once.
        workers: threads that decode; 0 for one a processor, up to 16.
        share: whose batches.
    """
    rank, world = share
    total = min(count or sys.maxsize, source.length or sys.maxsize)
    mine = (
        deferred
        for place, deferred in enumerate(source.deferred(0, total))
        if place // batch_size % world == rank
    )
    made = ordered_map(lambda deferred: work(deferred()), mine, workers or min(16, os.cpu_count() or 1))
    with shared_progress(title, _share_of(total, batch_size, share), share) as bar:
        while batch := list(islice(made, batch_size)):
            yield batch
            bar.advance(len(batch))


@contextlib.contextmanager
def shared_progress(title: str, total: int | None, share: Share) -> Iterator[Bar]:
    """A bar of this process's part of the work, shown by the first process alone."""
    rank, world = share
    title += f" (one of {world} processes)" * (world > 1)
    with progress(title, total, shown=rank == 0) as bar:
        yield bar


def _share_of(total: int, size: int, share: Share) -> int | None:
    """How many of `total` images are in a process's batches; None if nobody knows their number."""
    rank, world = share
    if total == sys.maxsize:
        return None
    whole, rest = divmod(total, size)
    return len(range(rank, whole, world)) * size + (rest if whole % world == rank else 0)

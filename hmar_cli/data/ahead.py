"""Working ahead of the consumer with threads: image codecs and tokenizers release Python's lock."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def ordered_map(function: Callable[[In], Out], items: Iterable[In], workers: int) -> Iterator[Out]:
    """Yield `function(item)` in the order of `items`, computed by `workers` threads a little ahead.

    With fewer than two workers everything happens in the caller's thread. Errors of `function` are raised in
    the place of its result.
    """
    if workers < 2:
        yield from map(function, items)
        return
    pending: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def prefetch(items: Iterable[Out], depth: int = 2) -> Iterator[Out]:
    """Yield `items`, produced by one thread that stays up to `depth` of them ahead.

    An error of the producer is raised to the consumer after the items before it; closing the generator ends
    the thread.
    """
    ready: queue.Queue[tuple[bool, Out | BaseException | None]] = queue.Queue(maxsize=max(depth, 1))
    closed = threading.Event()

    def put(entry: tuple[bool, Out | BaseException | None]) -> bool:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=produce, name="hmar-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if more:
                yield value  # type: ignore[misc]  # entries marked True hold items
            elif isinstance(value, BaseException):
                raise value
            else:
                return
    finally:
        closed.set()
        thread.join()

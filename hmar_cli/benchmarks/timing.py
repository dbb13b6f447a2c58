"""Time and memory of calls on a device."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WARM_UPS = 3
FEWEST, MOST = 10, 200
SLEEP = 1_000_000
"""Cycles of the trial sleep that tells how long a cycle is."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median: of all repeats.
        p10: tenth percentile.
        p90: ninetieth percentile.
        repeats: how many.
        host: what the host alone takes to issue the call; more than `median` means that a program which issues
            calls one by one is held up by its host.
    """

    median: float
    p10: float
    p90: float
    repeats: int
    host: float


def time_calls(
    turn: Callable[[int], Sequence[Call]], device: torch.device, seconds: float, *, ahead: bool = True
) -> list[Timing]:
    """Time the calls of a turn, over many turns.

    On a GPU, events stand before and after each call. On a CPU it is the wall clock.

    Args:
        turn: the calls of turn i, to be run one after another.
        device: where they run.
        seconds: about how long to measure, within 10 to 200 turns.
        ahead: the GPU sleeps before each turn for as long as the host needs to issue it, so that only the GPU's
            time is measured; else it also waits for the host, as it does in a program.

    Returns:
        A timing for each call of a turn.
    """
    numbers = itertools.count()
    hosts, walls = [], []
    for _ in range(WARM_UPS):
        start = time.perf_counter()
        hosts.append([_wall(call) for call in turn(next(numbers))])
        _wait(device)
        walls.append(time.perf_counter() - start)
    host = [min(each) for each in zip(*hosts, strict=True)]
    repeats = math.ceil(min(max(seconds / max(min(walls), 1e-9), FEWEST), MOST))
    if device.type == "cuda":
        turns = _events(turn, numbers, repeats, device, 1.5 * sum(host) + 0.05 if ahead else 0.0)
    else:
        turns = [[_wall(call) for call in turn(next(numbers))] for _ in range(repeats)]
    return [_timing(times, own) for times, own in zip(zip(*turns, strict=True), host, strict=True)]


def _wall(call: Call) -> float:
    """Milliseconds of the wall clock that a call takes to return."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def _wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _events(
    turn: Callable[[int], Sequence[Call]],
    numbers: "itertools.count[int]",
    repeats: int,
    device: torch.device,
    sleep: float,
) -> list[list[float]]:
    """Milliseconds of each call of each turn, by the GPU's clock; it sleeps for `sleep` ms before a turn."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1)  # loads the kernel
    _wait(device)
    first.record()
    torch.cuda._sleep(SLEEP)
    last.record()
    _wait(device)
    cycles = int(SLEEP * sleep / max(first.elapsed_time(last), 1e-3))
    turns = []
    for _ in range(repeats):
        calls = turn(next(numbers))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        if cycles:
            torch.cuda._sleep(cycles)
        marks[0].record()
        for call, mark in zip(calls, marks[1:], strict=True):
            call()
            mark.record()
        turns.append(marks)
    _wait(device)
    return [[a.elapsed_time(b) for a, b in itertools.pairwise(marks)] for marks in turns]


def _timing(times: Sequence[float], host: float) -> Timing:
    """Sum up the times of one call."""
    ordered = sorted(times)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Timing(median=at(0.5), p10=at(0.1), p90=at(0.9), repeats=len(ordered), host=host)


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that a call takes beyond what is there, its results included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()  # held until the peak is read
    peak = torch.cuda.max_memory_allocated(device) - before
    del results
    return peak


def describe_device(device: torch.device) -> dict[str, object]:
    """What a measurement ran on: hardware and versions."""
    import importlib.util
    import platform

    about: dict[str, object] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if importlib.util.find_spec("triton"):
        about["triton"] = importlib.import_module("triton").__version__
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return about

"""Tables of the benchmarks, for people."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hmar_cli.benchmarks.attention import BASELINE, Row
from hmar_cli.benchmarks.cases import Case

WIDTH = 150
"""Columns where no terminal says how many there are."""


def console() -> Console:
    """A console on standard output, wide enough where that is a file."""
    width = None if sys.stdout.isatty() else max(WIDTH, shutil.get_terminal_size().columns)
    return Console(width=width, highlight=False, markup=False)


def speed_tables(rows: Sequence[Row], directions: Sequence[str]) -> list[Table]:
    """A table for each case: an implementation a line, the fastest in bold.

    Args:
        rows: what was measured.
        directions: "forward", "backward" or both.
    """
    cases = list(dict.fromkeys(row.case for row in rows))
    return [_speed_table(case, rows, directions) for case in cases]


def _speed_table(case: Case, rows: Sequence[Row], directions: Sequence[str]) -> Table:
    work = ", ".join(
        f"{case.flop(direction) / 1e9:,.4g} useful GFLOP {direction}" for direction in directions
    )
    own = [row for row in rows if row.case == case]
    table = Table(
        box=None, header_style="bold", padding=(0, 2, 0, 0), title_justify="left", title_style="bold"
    )
    table.title = f"{case.title()}: {work}"
    table.add_column("implementation", no_wrap=True)
    for direction in directions:
        for header in (f"{direction} ms", "p10..p90", "TFLOP/s", f"× {BASELINE}", "host ms"):
            table.add_column(header, justify="right", no_wrap=True)
    table.add_column("peak MiB", justify="right", no_wrap=True)
    fastest = {
        direction: min((r.times[direction].median for r in own if direction in r.times), default=0.0)
        for direction in directions
    }
    for row in own:
        if row.status != "ok":
            table.add_row(
                row.implementation, Text(row.status, style="" if row.status == "unavailable" else "red")
            )
            continue
        cells: list[Text | str] = [row.implementation]
        for direction in directions:
            cells += _cells(row, direction, rows, fastest[direction])
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
        table.add_row(*cells, peak)
    return table


def _cells(row: Row, direction: str, rows: Sequence[Row], fastest: float) -> list[Text | str]:
    """Time, spread, rate, speed-up and the host's time of one direction."""
    timing = row.times[direction]
    speedup = row.speedup(direction, rows)
    return [
        Text(f"{timing.median:.4g}", style="bold" if timing.median == fastest else ""),
        f"{timing.p10:.4g}..{timing.p90:.4g}",
        f"{row.tflops(direction):,.3g}",
        "" if speedup is None else f"{speedup:.2f}",
        f"{timing.host:.2g}",
    ]


def notes(rows: Sequence[Row]) -> list[str]:
    """What the tables have no room for: why something was not timed, each reason once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            found.setdefault((row.implementation, row.status, row.detail), []).append(row.case.title())
    lines = []
    for (name, status, detail), cases in found.items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        lines.append(f"{name} {status} ({where}): {detail}")
    return lines


def step_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of whole training steps."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for header in ("recipe", "batch", "implementation", "ms", "p10..p90", "images/s", "peak GiB", "compiled"):
        words = header in ("recipe", "implementation")
        table.add_column(header, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        head = [row["recipe"], str(row["batch"]), row["implementation"]]
        if row["status"] != "ok":
            table.add_row(*head, Text(row["status"], style="" if row["status"] == "unavailable" else "red"))
            continue
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        spread = f"{row['p10_ms']:.4g}..{row['p90_ms']:.4g}"
        table.add_row(
            *head, f"{row['median_ms']:.4g}", spread, f"{row['images_per_second']:,.4g}", peak,
            "yes" if row["compiled"] else "no",
        )  # fmt: skip
    return table


def sampling_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of batches of images."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    headers = ("recipe", "batch", "compiled", "ms", "p10..p90", "images/s", "peak GiB", "first ms")
    for header in headers:
        table.add_column(header, justify="left" if header == "recipe" else "right", no_wrap=True)
    for row in rows:
        head = [row["recipe"], str(row["batch"]), "yes" if row["compiled"] else "no"]
        if row["status"] != "ok":
            table.add_row(*head, Text(row["status"], style="red"))
            continue
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        numbers = [f"{row[key]:,.4g}" for key in ("median_ms", "images_per_second", "first_ms")]
        spread = f"{row['p10_ms']:.4g}..{row['p90_ms']:.4g}"
        table.add_row(*head, numbers[0], spread, numbers[1], peak, numbers[2])
    return table


def tuning_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of settings of the Triton kernels: those in use and the fastest, a kernel a line."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for header in ("pattern", "scales", "shape", "kernel", "in use ms", "fastest ms", "fastest"):
        table.add_column(header, justify="right" if header.endswith("ms") else "left")
    for row in rows:
        shape = f"B{row['batch']} H{row['heads']} D{row['head_size']}, {row['dtype']}"
        for kernel, used in row["found"]["chosen"].items():
            ranked = row["found"][kernel]
            times = [f"{each['ms']:.4g}" for each in ranked]
            in_use = [text for text, each in zip(times, ranked, strict=True) if each == each | used]
            table.add_row(
                row["pattern"], row["name"], shape + (", normalised" if row["normalised"] else ""), kernel,
                "".join(in_use[:1]), "".join(times[:1]), _say_setting(ranked[0]) if ranked else "none compiles",
            )  # fmt: skip
    return table


def _say_setting(setting: Mapping[str, Any]) -> str:
    """A setting in a few words."""
    words = ["{rows}x{block}, {warps} warps, {stages} stages".format(**setting)]
    words += [name for name in ("bulk", "inline") if setting[name]]
    return ", ".join(words + [f"{setting['registers']} registers"] * bool(setting["registers"]))


def plain_table(rows: Sequence[Mapping[str, object]]) -> Table:
    """A table of numbers, a column for each key."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for header in rows[0]:
        table.add_column(header.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{x:,}" if isinstance(x, int) else str(x) for x in row.values()))
    return table

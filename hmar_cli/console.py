"""Messages and progress bars, on standard error; tables of results, on standard output, which is for data."""

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, soft_wrap=True, markup=False)  # "FID[classifier]" is no markup

WIDE = 400
"""Most letters in a line of a table where no terminal says how many there are."""


def warn(text: str) -> None:
    """Say what makes a result doubtful."""
    console.print(Text("warning:", "yellow"), text, highlight=False)


def print_table(
    columns: Mapping[str, Literal["left", "right"]], rows: Iterable[Sequence[str | Text]]
) -> None:
    """Print a table on standard output: data, for people.

    Args:
        columns: their titles, each with the side to which it is aligned.
        rows: a cell for each column.
    """
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title, side in columns.items():
        table.add_column(title, justify=side, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else max(WIDE, shutil.get_terminal_size().columns)
    Console(width=width, highlight=False, markup=False).print(table)


class Rate(ProgressColumn):
    """Work done per second, in the bar's unit."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Draw the column."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {self.unit}/s", style="progress.data.speed")


class Bar:
    """Handle of one running bar."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more units as done."""
        self._progress.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Show a short text behind the bar, e.g. the loss."""
        self._progress.update(self._task, note=text)


@contextmanager
def progress(
    description: str,
    total: float | None,
    unit: str = "images",
    completed: float = 0,
    *,
    shown: bool = True,
) -> Iterator[Bar]:
    """Show a bar with count, rate, elapsed time and ETA while the block runs, or only its handle."""
    bar = Progress(
        TextColumn("{task.description}", style="progress.description", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not shown,
    )
    with bar:
        yield Bar(bar, bar.add_task(description, total=total, completed=completed, note=""))  # type: ignore[arg-type]

"""Messages and progress bars, all on standard error: standard output is for data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
from rich.text import Text

console = Console(stderr=True, soft_wrap=True)


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
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not shown,
    )
    with bar:
        yield Bar(bar, bar.add_task(description, total=total, completed=completed, note=""))  # type: ignore[arg-type]

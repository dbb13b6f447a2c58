"""Whole benchmarks: measure, keep the results in a folder as they come, draw."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from hmar_kernels import IMPLEMENTATIONS

from hmar_cli.benchmarks import charts, tables
from hmar_cli.benchmarks.attention import Row, measure
from hmar_cli.benchmarks.cases import (
    FLOP_MODEL,
    RESOLUTIONS,
    Case,
    lengths_by_resolution,
    lengths_by_steps,
    visible_pairs,
)
from hmar_cli.benchmarks.correctness import DTYPES, reason_against
from hmar_cli.benchmarks.sampling import measure_sampling
from hmar_cli.benchmarks.timing import describe_device
from hmar_cli.benchmarks.train_step import measure_steps
from hmar_cli.console import Bar, console, progress
from hmar_cli.errors import UserError
from hmar_cli.files import write_json
from hmar_cli.models.scales import Scales
from hmar_cli.settings import Recipe

TIMED = ("masked", *(name for name in IMPLEMENTATIONS if name not in ("masked", "reference")))
"""What is measured when nothing else is said; the baseline is first."""

FAULTS = ("wrong", "failed")


@dataclass
class Outcome:
    """What a benchmark gave.

    Attributes:
        document: the results as JSON.
        rows: of the table, as `Row` or as JSON.
        files: what was written.
        interrupted: by Ctrl-C; `document` holds what there was.
        faulty: an implementation was wrong or failed.
        tables: for people.
        notes: lines below the tables, such as why something was not timed.
    """

    document: dict[str, Any]
    rows: list[Any] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    interrupted: bool = False
    faulty: bool = False
    tables: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@contextmanager
def _until_interrupted(outcome: Outcome) -> Iterator[None]:
    """Note Ctrl-C, and go on behind the block."""
    try:
        yield
        outcome.document["complete"] = True
    except KeyboardInterrupt:
        outcome.interrupted = True


def _document(device: torch.device, **settings: Any) -> dict[str, Any]:
    """The head of a results file."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"complete": False, "date": now, **describe_device(device), **settings}


def run_speed(
    cases: Sequence[Case],
    implementations: Sequence[str],
    *,
    device: torch.device,
    directions: Sequence[str],
    seconds: float,
    seed: int,
    out: Path,
) -> Outcome:
    """Check and time attention; `speed.json` grows row by row, charts follow at the end.

    Args:
        cases: the shapes.
        implementations: names of `hmar_kernels.IMPLEMENTATIONS`.
        device: where.
        directions: "forward", "backward" or both.
        seconds: about how long to time each.
        seed: of all random numbers.
        out: folder for the results.
    """
    document = _document(device, flop_model=FLOP_MODEL, seed=seed, seconds=seconds)
    outcome = Outcome(document)
    target = out / "speed.json"
    with _until_interrupted(outcome), progress("attention", len(cases) * len(implementations), "runs") as bar:
        found = measure(
            cases, implementations, device=device, directions=directions, seconds=seconds, seed=seed
        )
        for row in _noted(found, bar, _say_row):
            outcome.rows.append(row)
            document["rows"] = [each.describe(outcome.rows) for each in outcome.rows]
            write_json(target, document)
    document["rows"] = [each.describe(outcome.rows) for each in outcome.rows]
    write_json(target, document)
    rows: list[Row] = outcome.rows
    outcome.faulty = any(row.status in FAULTS for row in rows)
    outcome.files = [target, *charts.speed_charts(rows, out, document["device"])]
    outcome.tables, outcome.notes = tables.speed_tables(rows, directions), tables.notes(rows)
    return outcome


def _noted(rows: Iterator[Any], bar: Bar, say: Callable[[Any], str]) -> Iterator[Any]:
    """Pass rows on; show each behind the bar, or as a line where no bar can be drawn."""
    for row in rows:
        if console.is_terminal:
            bar.note(say(row))
        else:
            console.print(say(row), highlight=False)
        yield row
        bar.advance()


def _say_row(row: Row) -> str:
    """A row in a few words."""
    times = ", ".join(f"{direction} {timing.median:.4g} ms" for direction, timing in row.times.items())
    return f"{row.implementation}, {row.case.pattern} {row.case.name}: {times or row.status} ({row.case.shape()})"


def _say_step(row: dict[str, Any]) -> str:
    """A training step in a few words."""
    what = f"{row['median_ms']:.4g} ms" if row["status"] == "ok" else row["status"]
    return f"{row['implementation']}, {row['recipe']}: {what}"


def run_steps(
    recipes: Sequence[Recipe],
    implementations: Sequence[str],
    *,
    device: torch.device,
    batch: int,
    compiled: bool | None,
    seconds: float,
    seed: int,
    out: Path,
) -> Outcome:
    """Time whole training steps; `train-step.json` grows row by row; see `measure_steps`."""
    outcome = Outcome(_document(device, seed=seed, seconds=seconds, rows=[]))
    rows, target = outcome.document["rows"], out / "train-step.json"
    total = len(recipes) * len(implementations)
    with _until_interrupted(outcome), progress("training steps", total, "runs") as bar:
        found = measure_steps(
            recipes,
            implementations,
            device=device,
            batch=batch,
            compiled=compiled,
            seconds=seconds,
            seed=seed,
        )
        for row in _noted(found, bar, _say_step):
            rows.append(row)
            write_json(target, outcome.document)
    write_json(target, outcome.document)
    outcome.rows, outcome.files, outcome.tables = rows, [target], [tables.step_table(rows)]
    outcome.notes = [
        f"{row['implementation']} {row['status']} ({row['recipe']}): {row['detail']}"
        for row in rows
        if row["detail"]
    ]
    outcome.faulty = any(row["status"] in FAULTS for row in rows)
    if timed := [row for row in rows if row["status"] == "ok"]:
        charts.step_chart(timed, out / "train-step.png", outcome.document["device"])
        outcome.files.append(out / "train-step.png")
    return outcome


def run_sampling(
    recipes: Sequence[Recipe], batches: Sequence[int], *, device: torch.device, out: Path, **settings: Any
) -> Outcome:
    """Time how long images take; `sampling.json` grows row by row; see `measure_sampling` for the settings."""
    outcome = Outcome(_document(device, **settings, rows=[]), files=[out / "sampling.json"])
    rows = outcome.document["rows"]
    total = len(recipes) * len(batches) * len(settings["compiled"])
    with _until_interrupted(outcome), progress("sampling", total, "runs") as bar:
        for row in _noted(measure_sampling(recipes, batches, device=device, **settings), bar, _say_batch):
            rows.append(row)
            write_json(outcome.files[0], outcome.document)
    write_json(outcome.files[0], outcome.document)
    outcome.rows, outcome.tables = rows, [tables.sampling_table(rows)]
    outcome.notes = [f"{_say_batch(row)}: {row['detail']}" for row in rows if row["status"] != "ok"]
    outcome.faulty = any(row["status"] in FAULTS for row in rows)
    return outcome


def _say_batch(row: dict[str, Any]) -> str:
    """A batch of images in a few words."""
    what = f"{row['median_ms']:.4g} ms" if row["status"] == "ok" else row["status"]
    return f"{row['recipe']}, batch {row['batch']}{', compiled' if row['compiled'] else ''}: {what}"


def run_lengths(resolutions: Sequence[int], out: Path) -> Outcome:
    """Sequence length against resolution and extra steps (HMAR supplement B.1, Figs 7 and 8).

    Args:
        resolutions: those at which steps are added.
        out: folder for `sequence-lengths.json` and `.png`.
    """
    by_resolution = lengths_by_resolution()
    by_steps = {pixels: lengths_by_steps(RESOLUTIONS[pixels]) for pixels in resolutions}
    document = {"by_resolution": by_resolution, "by_steps": {str(p): rows for p, rows in by_steps.items()}}
    files = [out / "sequence-lengths.json", out / "sequence-lengths.png"]
    write_json(files[0], document)
    charts.length_chart(by_resolution, by_steps, files[1])
    rows = [{"pixels": p, **row} for p, steps in by_steps.items() for row in steps]
    return Outcome(
        document, rows, files, tables=[tables.plain_table(by_resolution), tables.plain_table(rows)]
    )


def run_patterns(scales: dict[str, Scales], out: Path) -> Outcome:
    """Attention patterns and how much of all pairs they see (HMAR supplement B.3, Fig. 10).

    Args:
        scales: scale lists by name.
        out: folder for `patterns.json` and a picture for each list.
    """
    outcome = Outcome({"lists": []}, files=[out / "patterns.json"])
    for name, each in scales.items():
        pairs = {
            pattern: visible_pairs(each.lengths, pattern == "causal") for pattern in ("causal", "diagonal")
        }
        shares = {pattern: n / each.total**2 for pattern, n in pairs.items()}
        target = out / f"patterns-{name.replace(' ', '').replace(',', '-')}.png"
        charts.pattern_chart(each, name, shares, target)
        outcome.files.append(target)
        row = {"name": name, "sides": each.sides(), "length": each.total}
        outcome.document["lists"].append({**row, "visible_pairs": pairs, "visible_share": shares})
        numbers: dict[str, Any] = {f"{pattern} %": f"{share:.1%}" for pattern, share in shares.items()}
        outcome.rows.append({"scales": name, "tokens": each.total, **numbers})
    write_json(outcome.files[0], outcome.document)
    outcome.tables = [tables.plain_table(outcome.rows)]
    return outcome


def run_tuning(cases: Sequence[Case], device: torch.device, out: Path) -> Outcome:
    """Look for better tiles of the Triton kernels, and write what was found to `tune.json`.

    Raises:
        UserError: no GPU, no Triton, or shapes that the kernels don't serve.
    """
    if device.type != "cuda":
        raise UserError("--tune needs a GPU, and none is visible to PyTorch", "leave it out")
    try:
        tune = importlib.import_module("hmar_kernels.triton_attention").tune
    except (ImportError, AttributeError) as error:
        raise UserError(f"--tune: Triton's kernels cannot be tuned: {error}", "install triton") from error
    for case in cases:
        if reason := reason_against(case, "triton", device):
            raise UserError(f"--tune: {reason}", "choose other shapes, or leave out --tune")
    outcome = Outcome(_document(device, rows=[]), files=[out / "tune.json"])
    rows = outcome.document["rows"]
    with _until_interrupted(outcome), progress("tuning", len(cases), "shapes") as bar:
        for case in cases:
            bar.note(case.title())
            found = tune(
                case.scales.lengths,
                case.pattern == "causal",
                batch=case.batch,
                heads=case.heads,
                head_size=case.head_size,
                dtype=DTYPES[case.dtype],
                normalized=case.normalised,
                device=device,
            )
            rows.append({**case.describe(), "found": found})
            write_json(outcome.files[0], outcome.document)
            bar.advance()
    write_json(outcome.files[0], outcome.document)
    outcome.rows, outcome.tables = rows, [tables.tuning_table(rows)]
    return outcome

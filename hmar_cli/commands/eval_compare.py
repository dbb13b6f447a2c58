"""`hmar eval compare`: reports of `hmar eval` side by side, if their numbers may be compared at all."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.commands.flags import short_names, words
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.evaluation.reports import Report

EXAMPLES = """
Put reports side by side: their numbers, the best of each in bold, and the settings in which the runs differ.

Numbers compare only where extractor (by the hash of its weights), reference, number of images, size, crop and the
settings of the metrics are the same. Where one differs nothing is printed but its name. The inception score and the
accuracy need no reference, so that `--metrics is` compares them whatever it was.

**Examples**

- `hmar eval compare var.json hmar.json himar.json`
- `hmar eval compare reports/*.json --metrics fid,is`
- `hmar eval compare var.json hmar.json --json`
"""

FOUND = ("unreadable", "right", "accuracy", "sha256", "source", "kind")
"""Parts of a report's subject that are no settings."""

NAMES = ("weights_sha256", "tokenizer_hash", "class_names", "recipe", "step")
"""Settings that have no row in the table, since others say the same in fewer letters."""


def register(app: typer.Typer) -> None:
    """Add the command to `hmar eval`."""
    app.command("compare", help=EXAMPLES)(compare)


def compare(
    reports: Annotated[list[Path], typer.Argument(help="Files of `--out`, two or more.", show_default=False)],
    metrics: Annotated[
        str, typer.Option(help="Metrics to compare by, as fid,is. [default: all, which each must have]")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare; the help text is `EXAMPLES`."""
    from hmar_cli.evaluation.reports import ABSENT, comparable_metrics, differences, read_report

    if len(reports) < 2:
        raise UserError(f"{len(reports)} report to compare", "give two or more files")
    names = short_names(reports, lambda path: path.stem)
    found = {name: read_report(path) for name, path in zip(names, reports, strict=True)}
    shared = comparable_metrics(found, words(metrics))
    every = differences([report.subject for report in found.values()])
    apart = {key: values for key, values in every.items() if key not in FOUND}
    if as_json:
        rows = [
            {
                "report": name,
                "metrics": {metric: report.metrics[metric].describe() for metric in shared},
                "subject": {key: values[place] for key, values in apart.items() if values[place] != ABSENT},
            }
            for place, (name, report) in enumerate(found.items())
        ]
        settings = dict(next(iter(found.values())).settings)
        print(json.dumps({"settings": settings, "rows": rows}, indent=2, ensure_ascii=False))
        return
    shown = {
        key: values
        for key, values in apart.items()
        if ABSENT not in values
        and key.split(".")[-1] not in NAMES  # settings of one family alone are in the JSON
    }
    print_columns(found, shared, shown)


def print_columns(reports: "dict[str, Report]", metrics: list[str], settings: dict[str, list[Any]]) -> None:
    """Print a table: a report a column, first its numbers, then the settings that are not the same in all."""
    from rich.text import Text

    from hmar_cli.console import print_table
    from hmar_cli.evaluation.reports import as_text, best

    rows: list[list[str | Text]] = []
    for metric in metrics:
        numbers = [report.metrics[metric] for report in reports.values()]
        leader = best(metric, [each.value for each in numbers])
        cells = (Text(as_text(metric, each), "bold" if each.value == leader else "") for each in numbers)
        category = metric.rpartition(".")[0]  # of T2I-CompBench, whose numbers bear one name in all of them
        rows.append([f"{category}: {numbers[0].name}" if category else numbers[0].name, *cells])
    for key, values in settings.items():
        rows.append([key.split(".")[-1].replace("_", " "), *map(as_cell, values)])
    print_table({"": "left", **dict.fromkeys(reports, "right")}, rows)


def as_cell(value: Any) -> str:
    """A setting in a table's cell: hashes by their first 12 digits, long lists by their ends."""
    text = json.dumps(value) if isinstance(value, list | bool) or value is None else str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= 40 else f"{text[:24]}…{text[-12:]}"

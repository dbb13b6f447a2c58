"""What every analysis leaves behind: a table, its numbers with the settings, a figure and, where it has one, a grid.

OUT/NAME.json       {"analysis": NAME, "settings": {...}, "summary": {...}, "rows": [...]}
OUT/NAME.csv        the rows
OUT/NAME.png        the figure
OUT/NAME-grid.png   images
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hmar_cli.console import console, print_table
from hmar_cli.data.transforms import Pixels
from hmar_cli.files import atomic_file, require_writable, write_json
from hmar_cli.report import labelled_grid, save_figure, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

Cell = str | int | float | bool | None
Row = Mapping[str, Cell]


def analysis_folder(out: Path | None, name: str) -> Path:
    """The folder of an analysis: `out`, or "analysis/NAME". Commands also ask before the work, so that none is lost.

    Raises:
        UserError: nothing can be written there.
    """
    folder = out or Path("analysis") / name
    require_writable(folder / f"{name}.json")
    return folder


def publish_analysis(
    out: Path | None,
    name: str,
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    figure: "Figure | None",
    *,
    as_json: bool,
    tiles: Mapping[str, Sequence[Pixels]] | None = None,
    drawn: Sequence[Path] = (),
    summary: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    shown: Sequence[Row] = (),
) -> None:
    """Write an analysis and print it; see `save_analysis` and `print_analysis`.

    Args:
        out: the folder; None for "analysis/NAME".
        name: of the analysis.
        rows: the numbers.
        settings: what they depend on.
        figure: of the rows; None where a file of `drawn` is it.
        as_json: print JSON instead of a table.
        tiles: images of each row of the grid, by its label; None for no grid.
        drawn: files that are written already.
        summary: what the rows come to.
        notes: the same for people.
        shown: fewer rows for the table.
    """
    grid, folder = labelled_grid(tiles) if tiles else None, analysis_folder(out, name)
    files = [*drawn, *save_analysis(folder, name, rows, settings, figure, grid=grid, summary=summary)]
    print_analysis(name, rows, settings, files, as_json=as_json, summary=summary, notes=notes, shown=shown)


def save_analysis(
    out: Path,
    name: str,
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    figure: "Figure | None",
    *,
    grid: "Image.Image | None" = None,
    summary: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write an analysis into a folder, each file complete or absent; the JSON comes last.

    Args:
        out: the folder; made where it is missing.
        name: of the analysis, the stem of its files.
        rows: the numbers; rows may have different keys. A number that is not finite is null in JSON, empty in CSV.
        settings: all that the numbers depend on, as JSON values: checkpoints and their hashes, data, seeds.
        figure: drawn from the rows; None writes none.
        grid: images that belong to the rows; None writes none.
        summary: what the rows come to, such as a fit, as JSON values.

    Returns:
        The files.
    """
    files = {kind: out / f"{name}{kind}" for kind in (".png", "-grid.png", ".csv", ".json")}
    written = []
    if figure is not None:
        save_figure(figure, files[".png"])
        written.append(files[".png"])
    if grid is not None:
        save_png(grid, files["-grid.png"])
        written.append(files["-grid.png"])
    with atomic_file(files[".csv"]) as temporary:
        temporary.write_text(_as_csv(rows), encoding="utf-8")
    write_json(files[".json"], _document(name, rows, settings, summary))
    return [*written, files[".csv"], files[".json"]]


def print_analysis(
    name: str,
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    files: Sequence[Path],
    *,
    as_json: bool,
    summary: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    shown: Sequence[Row] = (),
) -> None:
    """Show an analysis: a table or JSON on standard output; notes and the files' names on standard error.

    Args:
        name: of the analysis.
        rows: see `save_analysis`.
        settings: see `save_analysis`; in the JSON alone.
        files: what was written.
        as_json: print JSON instead of a table: what the file holds, and "files".
        summary: see `save_analysis`; in the JSON alone.
        notes: lines that say what the numbers come to.
        shown: fewer rows for the table, where there are too many to read; by default all.
    """
    if as_json:
        document = {**_document(name, rows, settings, summary), "files": [str(file) for file in files]}
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _print_table(shown or rows)
    for line in notes:
        console.print(line, highlight=False)
    console.print(f"written: {', '.join(map(str, files))}", highlight=False)


def _print_table(rows: Sequence[Row]) -> None:
    """Print rows as a table; numbers are aligned to the right."""
    keys = _keys(rows)
    titles: dict[str, Literal["left", "right"]] = {}
    for key in keys:
        number = all(isinstance(row.get(key, 0), int | float | None) for row in rows)
        titles[key.replace("_", " ")] = "right" if number else "left"
    print_table(titles, ([_text(row.get(key)) for key in keys] for row in rows))


def _text(value: Cell) -> str:
    """A cell for people: four digits of a fraction."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _document(
    name: str, rows: Sequence[Row], settings: Mapping[str, Any], summary: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The JSON of an analysis."""
    numbers = [{key: _finite(value) for key, value in row.items()} for row in rows]
    return {"analysis": name, "settings": dict(settings), "summary": dict(summary or {}), "rows": numbers}


def _as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV with a head line; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _keys(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _finite(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _keys(rows: Sequence[Row]) -> list[str]:
    """The keys of all rows, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _finite(value: Cell) -> Cell:
    return None if isinstance(value, float) and not math.isfinite(value) else value

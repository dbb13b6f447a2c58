"""What every analysis leaves behind."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hmar_cli.analysis.results import print_analysis, save_analysis
from hmar_cli.report import dress_axes, labelled_grid, new_figure

ROWS = [{"model": "a", "fid": 1.5, "note": None}, {"model": "b", "fid": float("nan"), "steps": 3}]


def test_files_hold_the_same_numbers(tmp_path: Path) -> None:
    figure = new_figure(3, 2)
    dress_axes(figure.add_subplot(), "title", "x", "y")
    grid = labelled_grid({"first": [np.zeros((8, 8, 3), np.uint8)]})
    files = save_analysis(
        tmp_path / "new", "made-up", ROWS, {"seed": 7}, figure, grid=grid, summary={"peak": 2}
    )
    names = ["made-up.png", "made-up-grid.png", "made-up.csv", "made-up.json"]
    assert [file.name for file in files] == names == sorted(names, key=[p.name for p in files].index)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(
        names
    )  # nothing half-written is left
    found = json.loads((tmp_path / "new" / "made-up.json").read_text())
    assert found["analysis"] == "made-up"
    assert found["settings"] == {"seed": 7} and found["summary"] == {"peak": 2}
    assert found["rows"] == [
        {"model": "a", "fid": 1.5, "note": None},
        {"model": "b", "fid": None, "steps": 3},
    ]
    with (tmp_path / "new" / "made-up.csv").open() as file:
        table = list(csv.DictReader(file))
    assert table == [
        {"model": "a", "fid": "1.5", "note": "", "steps": ""},
        {"model": "b", "fid": "", "note": "", "steps": "3"},
    ]
    with Image.open(tmp_path / "new" / "made-up.png") as image:
        assert image.size == (360, 240)


def test_without_a_figure_no_picture_is_written(tmp_path: Path) -> None:
    files = save_analysis(tmp_path, "bare", ROWS, {}, None)
    assert [file.suffix for file in files] == [".csv", ".json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.csv", "bare.json"]


def test_the_table_and_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    files = [Path("out/x.csv")]
    print_analysis("x", ROWS, {"seed": 7}, files, as_json=True, summary={"peak": 2}, notes=["a note"])
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["rows"][1]["fid"] is None and document["files"] == ["out/x.csv"]
    assert (document["analysis"], document["settings"], document["summary"]) == (
        "x",
        {"seed": 7},
        {"peak": 2},
    )
    assert "a note" in shown.err and "out/x.csv" in shown.err
    print_analysis("x", ROWS, {}, files, as_json=False, shown=[{"model": "short", "fid": 0.123456}])
    lines = capsys.readouterr().out.split()
    assert lines == ["model", "fid", "short", "0.1235"]


def test_a_grid_has_a_labelled_row_for_each_kind() -> None:
    red, blue = (np.full((16, 32, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    grid = labelled_grid({"red": [red, red, red], "a label so long that it takes several lines": [blue]})
    pixels = np.asarray(grid)
    left = grid.width - 3 * (4 * 32 + 4)  # enlarged four times, to a height of 64
    assert grid.height == 2 * (64 + 4) and left > 0
    assert (pixels[:64, left : left + 128] == (255, 0, 0)).all()
    assert (pixels[68:132, left : left + 128] == (0, 0, 255)).all()
    assert (pixels[68:132, left + 132 :] == 255).all()
    assert (pixels[:, :left] < 128).any(axis=(1, 2)).any()  # something is written
    with pytest.raises(ValueError, match="at least one"):
        labelled_grid({})

"""`hmar curves` on the metrics files of runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from toy_runs import hmar


def write_run(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs whose folders have one name, one of them with three scales and a line that was cut off."""
    rows = [
        {"step": s, "accuracy": s / 10, "accuracy_per_scale": [0.1, 0.2, s / 9], "loss": 1.0} for s in (1, 2)
    ]
    first = write_run(tmp_path / "a" / "run", *rows)
    with (first / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "acc')
    return first, write_run(tmp_path / "b" / "run", {"step": 5, "accuracy": 0.5})


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_per_scale"])
def test_curves_of_runs_of_one_name(runs: tuple[Path, Path], tmp_path: Path, metric: str) -> None:
    out = tmp_path / "pictures" / "curves.png"
    result = hmar("curves", *runs, "--metric", metric, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout)
    assert {name: row["step"] for name, row in last.items()} == {str(runs[0]): 2, str(runs[1]): 5}
    with Image.open(out) as image:  # the whole and three scales, in one row
        assert image.width > 3 * image.height
        assert np.asarray(image.convert("L")).std() > 1


def test_panels_say_what_they_show(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked finetuning, another task, measures nothing at the first scale; sizes are told where they are known."""
    masked = write_run(tmp_path / "m", {"step": 1, "accuracy": 0.5, "accuracy_per_scale": [None, 0.75, 0.25]})
    drawn: dict[str, dict[str, list[float]]] = {}
    labels: set[tuple[str, str]] = set()

    def note(figure: Figure, file: Any, **_: Any) -> None:
        drawn.clear()
        for axes in figure.axes:
            drawn[axes.get_title()] = {str(x.get_label()): list(x.get_ydata()) for x in axes.lines}
            labels.add((axes.get_xlabel(), axes.get_ylabel()))
        Path(file).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", note)
    assert hmar("curves", runs[0], masked, "--out", tmp_path / "c.png").exit_code == 0
    assert list(drawn) == ["accuracy", "scale 1", "scale 2", "scale 3"] and list(drawn["scale 2"]) == [
        "run",
        "m",
    ]
    scales = "[tokenizer]\nscales = [1, 4, 8]\n"
    (runs[0] / "recipe.toml").write_text(f'extends = "hmar-tiny"\n{scales}')
    (masked / "recipe.toml").write_text(
        f'extends = "hmar-tiny"\n{scales}[objective]\nkind = "masked"\nlayers = 1\n[sample]\nschedule = []\n'
    )
    assert hmar("curves", runs[0], masked, "--out", tmp_path / "c.png").exit_code == 0
    assert list(drawn) == ["accuracy", "scale 1 (1x1)", "scale 2 (4x4)", "scale 3 (8x8)"]
    assert [p["m (masked finetuning)"] for p in drawn.values()] == [[50], [], [75], [25]]
    assert drawn["scale 2 (4x4)"]["run (next-scale prediction)"] == [20, 20]
    assert labels == {("step", "accuracy (%)")}
    assert hmar("curves", masked, "--out", tmp_path / "c.png").exit_code == 0
    assert list(drawn) == ["accuracy", "scale 2 (4x4)", "scale 3 (8x8)"]
    assert hmar("curves", runs[0], "--metric", "loss", "--out", tmp_path / "c.png").exit_code == 0
    assert ("step", "loss") in labels and drawn["loss"]["run (next-scale prediction)"] == [1, 1]


def test_one_run_goes_by_the_name_of_its_folder(runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = hmar("curves", runs[0], "--metric", "loss", "--out", tmp_path / "c.png", "--json")
    assert list(json.loads(result.stdout)) == ["run"]


def test_mistakes_are_one_line_and_a_hint(runs: tuple[Path, Path], tmp_path: Path) -> None:
    broken = write_run(tmp_path / "broken")
    (broken / "metrics.jsonl").write_text("no json\n")
    cases: dict[str, tuple[object, ...]] = {
        "no metrics.jsonl in": (tmp_path,),
        "measured nothing yet": (runs[0], write_run(tmp_path / "empty")),
        "metrics.jsonl is broken": (broken,),
        "no run measured 'fid'": (*runs, "--metric", "fid"),
    }
    for message, arguments in cases.items():
        result = hmar("curves", *arguments, "--out", tmp_path / "c.png")
        assert result.exit_code == 2, result.output
        first, hint = result.stderr.splitlines()
        assert first.startswith("error: ") and message in first and hint.startswith("hint: ")
    assert "they have accuracy, loss, step" in result.stderr
    assert not (tmp_path / "c.png").exists()

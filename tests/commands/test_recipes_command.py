import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomli
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.recipe import load_recipe, recipe_from_dict, recipe_names


def invoke(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["recipes", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_list_names_every_recipe_whole() -> None:
    shown = {line.split()[0] for line in invoke("list").stdout.splitlines()[1:]}
    assert shown == set(recipe_names())


def test_list_as_json() -> None:
    rows = {row["name"]: row for row in json.loads(invoke("list", "--json").stdout)}
    assert rows["var-d16"]["parameters"] == 310_283_520
    assert rows["hmar-d16"]["tokens"] == 680
    assert rows["hmar-d16-masked"]["what"] == "HMAR, masked"
    assert rows["msvq-tiny"]["data"] == "shapes"
    himar, mar = rows["himar-l"], rows["mar-tiny"]
    assert (himar["what"], himar["tokens"], himar["pivots"], himar["parameters"]) == (
        ("Hi-MAR", 256, 64, 529_228_336)
    )
    assert (mar["what"], mar["tokens"], mar["pivots"]) == ("MAR", 16, 0)
    assert rows["kl-tiny"]["what"] == "KL tokenizer"
    assert (rows["classifier-tiny"]["what"], rows["classifier-tiny"]["tokens"]) == ("classifier", 0)
    for name, data in {"himar-s-coco": "coco", "himar-scenes": "scenes", "himar-emoji": "emoji"}.items():
        assert (rows[name]["what"], rows[name]["data"]) == ("Hi-MAR, text", data)


def test_little_work_lies_between_two_checkpoints() -> None:
    """At most two hours of 8 GPUs at 200 TFLOP/s each, by 6 operations a parameter and token."""
    for row in json.loads(invoke("list", "--json").stdout):
        masked = "masked" in row["name"]  # finetuning, of few of the blocks
        if row["tokens"] and row["parameters"] and not masked:
            train = load_recipe(row["name"]).train
            images = train.batch_size * train.save_every
            hours = 6 * row["parameters"] * (row["pivots"] + row["tokens"]) * images / (8 * 200e12 * 3600)
            assert hours < 2, (row["name"], hours)


def test_show_prints_a_recipe_that_loads_again() -> None:
    result = invoke("show", "hmar-d16-masked", "--set", "train.batch_size=64")
    recipe = recipe_from_dict(tomli.loads(result.stdout))
    assert recipe == load_recipe("hmar-d16-masked", ["train.batch_size=64"])
    assert result.stderr == ""


def test_show_as_json_and_raw() -> None:
    assert json.loads(invoke("show", "var-d36-512", "--json").stdout)["model"]["shared_adaln"] is True
    assert invoke("show", "hmar-d16", "--raw").stdout.startswith("# HMAR-d16 on ImageNet")
    assert "--raw" in invoke("show", "hmar-d16", "--raw", "--json", code=2).stderr


def test_diff_prints_only_what_differs() -> None:
    table = json.loads(invoke("diff", "var-tiny", "hmar-tiny", "--json").stdout)
    assert table == {
        "model.pattern": {"var-tiny": "causal", "hmar-tiny": "diagonal"},
        "objective.weighting": {"var-tiny": "none", "hmar-tiny": "lognormal"},
    }
    lines = invoke("diff", "var-tiny", "hmar-tiny").stdout.splitlines()
    assert re.fullmatch(r'\s*model.pattern\s+"causal"\s+"diagonal"\s*', lines[1])
    assert len(lines) == 3
    assert "same settings" in invoke("diff", "var-tiny", "var-tiny").stdout


def test_diff_shows_what_looks_like_markup_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("[red]mine[/red].toml")
    path.parent.mkdir()
    path.write_text('extends = "msvq-tiny"\n[data]\nsource = "[red]x[/red]"\n')
    title, row = invoke("diff", "msvq-tiny", f"./{path}").stdout.splitlines()
    assert title.split() == ["setting", "msvq-tiny", f"./{path}"]
    assert row.split() == ["data.source", '"builtin:shapes"', '"[red]x[/red]"']


def test_validate_checks_the_shipped_recipes() -> None:
    assert f"{len(recipe_names())} recipes are valid" in invoke("validate").stdout


def test_validate_reports_the_mistakes_of_all_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.toml").write_text('extends = "var-tiny"\n[train]\nbatch_sise = 3\nseed = -1\n')
    (tmp_path / "good.toml").write_text('extends = "var-tiny"\n')
    invoke("validate", str(tmp_path / "good.toml"))
    files = [str(tmp_path / f"{name}.toml") for name in ("a", "good", "b")]
    result = invoke("validate", *files, "no-such", code=2)
    assert result.stdout == ""
    assert "error: 5 mistakes in 4 recipe(s)" in result.stderr
    assert result.stderr.count("did you mean train.batch_size?") == 2
    assert "no recipe named 'no-such'" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("hint: ")


@pytest.mark.parametrize("command", ["list", "show", "diff", "validate"])
def test_every_command_has_examples(command: str) -> None:
    assert f"hmar recipes {command}" in invoke(command, "--help").stdout

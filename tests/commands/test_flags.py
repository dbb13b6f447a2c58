"""Groups of flags: a dataclass stands for one flag a field."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from hmar_cli.commands.drawing import parse_schedule
from hmar_cli.commands.flags import choose, given, refuse_fixed, short_names, with_flags, words
from hmar_cli.errors import UserError
from hmar_cli.models.scales import Scales


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A flag of a group inside another."""

    slow: bool = False


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Two flags, and a group of more."""

    inner: Inner = Inner()
    size: Annotated[int, typer.Option(min=1, help="Of something.")]
    names: Annotated[list[str] | None, typer.Option("--name")] = None


def invoke(*arguments: str) -> Any:
    app = typer.Typer()

    @app.command()
    @with_flags
    def command(what: Annotated[str, typer.Argument()], shared: Shared, fast: bool = False) -> None:
        print(what, shared.size, shared.names, fast, shared.inner.slow)

    return CliRunner().invoke(app, arguments)


def test_a_command_gets_its_groups_filled() -> None:
    result = invoke("this", "--size", "3", "--name", "a", "--name", "b", "--fast", "--slow")
    assert result.exit_code == 0, result.output
    assert result.stdout == "this 3 ['a', 'b'] True True\n"
    assert invoke("this", "--size", "3").stdout == "this 3 None False False\n"


def test_flags_of_a_group_are_checked_and_explained() -> None:
    assert invoke("this").exit_code == 2  # --size has no default
    assert invoke("this", "--size", "0").exit_code == 2
    shown = invoke("--help").stdout
    assert "--size" in shown and "Of something." in shown and "--shared" not in shown


def test_what_was_given_is_what_differs_from_the_defaults() -> None:
    assert given(Shared(size=3)) == {"size": 3}
    assert given(Shared(size=3, names=["a"])) == {"size": 3, "names": ["a"]}
    assert given(Inner()) == {} and given(Inner(slow=True)) == {"slow": True}


def test_parts_between_commas() -> None:
    assert words(" a, b,,c ") == ["a", "b", "c"] and words("") == []
    assert choose("--some", "b,a,b", ("a", "b", "c"), "letter") == ["b", "a"]
    assert choose("--some", "", ("a", "b", "c"), "letter") == ["a", "b", "c"]
    with pytest.raises(UserError, match="--some a,d: no letter 'd'"):
        choose("--some", "a,d", ("a", "b", "c"), "letter")


def test_flags_that_a_preset_fixes() -> None:
    refuse_fixed("papers", {"size": 0, "crop": None, "labels": ""})
    with pytest.raises(UserError, match="--preset papers fixes --size, --crop"):
        refuse_fixed("papers", {"size": 8, "count": 0, "crop": "var"})


def test_short_names() -> None:
    paths = [Path("x/a.json"), Path("y/a.json"), Path("b.json")]
    assert short_names(paths, lambda path: path.stem) == ["x/a.json", "y/a.json", "b"]
    with pytest.raises(UserError, match=r"b\.json is given twice"):
        short_names([*paths, paths[2]])


def test_a_schedule_leaves_the_first_scale_whole() -> None:
    scales = Scales.of([2, 3])
    assert parse_schedule("single", (), scales) == ((4,), (1,) * 9)
    assert parse_schedule("1,9", (), scales) == ((4,), (1,) * 9)
    for text in ("2,1", "[[1,3],[9]]"):
        with pytest.raises(UserError, match="scale 1: expected one pass"):
            parse_schedule(text, (), scales)

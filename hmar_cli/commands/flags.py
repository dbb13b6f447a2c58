"""Groups of flags that several commands share, each written once as a dataclass; and what flags' texts come to."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import typer

from hmar_cli.errors import UserError
from hmar_cli.files import require_writable


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of flags: a parameter whose type is a dataclass stands for one flag a field.

    A field is written as a parameter of a command is, `name: Annotated[type, typer.Option(...)] = default`, and one
    without a default has to be given; or it is a group itself. The command gets the dataclass, filled.
    """
    signature = inspect.signature(command)
    groups: dict[str, Any] = {
        name: each.annotation for name, each in signature.parameters.items() if is_dataclass(each.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        parameters += _parameters(groups[name]) if name in groups else own

    @functools.wraps(command)
    def run(**flags: Any) -> None:
        filled = {name: _filled(group, flags) for name, group in groups.items()}
        command(**flags, **filled)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _parameters(group: Any) -> Iterator[inspect.Parameter]:
    """The flags of a group, in the order of its fields."""
    for each in fields(group):
        if is_dataclass(each.type):
            yield from _parameters(each.type)
            continue
        default = inspect.Parameter.empty if each.default is MISSING else each.default
        yield inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=each.type
        )


def _filled(group: Any, flags: dict[str, Any]) -> Any:
    """A group with its values, which are taken out of `flags`."""
    return group(
        **{
            each.name: _filled(each.type, flags) if is_dataclass(each.type) else flags.pop(each.name)
            for each in fields(group)
        }
    )


def given(group: Any) -> dict[str, Any]:
    """Of a filled group the flags that say something else than their defaults, by their names."""
    values = {each.name: getattr(group, each.name) for each in fields(group)}
    return {each.name: values[each.name] for each in fields(group) if values[each.name] != each.default}


def named(ctx: typer.Context) -> dict[str, str]:
    """Parameters that the command line names, each with its flag."""
    flags = {each.name: (each.opts or each.secondary_opts)[-1] for each in ctx.command.params}
    return {
        name: flags[name]
        for name in ctx.params
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def words(text: str) -> list[str]:
    """The parts of a flag between commas, without those that are empty."""
    return [part.strip() for part in text.split(",") if part.strip()]


def choose(flag: str, text: str, known: Sequence[str], what: str) -> list[str]:
    """The parts of a flag between commas, each of which has to be known; of an empty flag all that are known.

    Raises:
        UserError: one that is not.
    """
    chosen = list(dict.fromkeys(words(text))) or list(known)
    if unknown := [each for each in chosen if each not in known]:
        raise UserError(f"{flag} {text}: no {what} {unknown[0]!r}", f"there are {', '.join(known)}")
    return chosen


def refuse_fixed(preset: str, asked: Mapping[str, Any]) -> None:
    """Refuse flags that a preset fixes.

    Args:
        preset: its name.
        asked: what it fixes, by the names of the flags; empty where one was not given.

    Raises:
        UserError: one of them was.
    """
    if flags := [f"--{name}" for name, value in asked.items() if value]:
        raise UserError(f"--preset {preset} fixes {', '.join(flags)}", "leave one out")


def short_names(
    paths: Sequence[Path], short: Callable[[Path], str] = lambda path: path.absolute().name
) -> list[str]:
    """A name for each path: a short one, or the path where several have that.

    Raises:
        UserError: the same path twice.
    """
    brief = [short(path) for path in paths]
    names = [name if brief.count(name) == 1 else str(path) for name, path in zip(brief, paths, strict=True)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{twice} is given twice", "give it once")
    return names


def require_places(out: Path | None, grid: Path | None) -> Path | None:
    """See that report and grid can be written, before the work that they are to show.

    Args:
        out: file of the report.
        grid: picture of images; None for one beside the report.

    Returns:
        Where the picture goes; None for nowhere.

    Raises:
        UserError: a file that cannot be written, or a report that is not called JSON.
    """
    if out and out.suffix != ".json":
        raise UserError(f"--out {out}: the report is JSON", f"call it {out.with_suffix('.json')}")
    picture = grid or (out.with_suffix(".png") if out else None)
    for target in filter(None, (out, picture)):
        require_writable(target)
    return picture

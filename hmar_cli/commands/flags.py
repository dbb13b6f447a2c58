"""Groups of flags that several commands share, each written once as a dataclass."""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any


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

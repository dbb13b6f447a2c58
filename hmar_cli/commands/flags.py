"""Groups of flags that several commands share, each written once as a dataclass."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of flags: a parameter whose type is a dataclass stands for one flag a field.

    A field is written as a parameter of a command is, `name: Annotated[type, typer.Option(...)] = default`, and one
    without a default has to be given. The command gets the dataclass, filled.
    """
    signature = inspect.signature(command)
    groups: dict[str, Any] = {
        name: each.annotation for name, each in signature.parameters.items() if is_dataclass(each.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        for each in fields(groups[name]):
            default = inspect.Parameter.empty if each.default is MISSING else each.default
            parameters.append(
                inspect.Parameter(
                    each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=each.type
                )
            )

    @functools.wraps(command)
    def run(**given: Any) -> None:
        filled = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **filled)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run

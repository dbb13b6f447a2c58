"""The spelling of a source: a location, and options after a question mark."""

import difflib
import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from hmar_cli.errors import UserError


def split_options(spec: str) -> tuple[str, dict[str, str]]:
    """Split SOURCE?key=value&… into location and options; a `?` without `=` after it belongs to a pattern."""
    location, mark, query = spec.rpartition("?")
    if not mark or not re.fullmatch(r"\w+=[^&]*(&\w+=[^&]*)*", query):
        return spec, {}
    pairs = (pair.partition("=") for pair in query.split("&"))
    return location, {key: unquote(value) for key, _, value in pairs}


def check_options(spec: str, options: Mapping[str, str], known: Sequence[str]) -> None:
    """Refuse an option that is none of the known.

    Raises:
        UserError: naming it, and the nearest known one.
    """
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            others = f"options are {', '.join(known)}" if known else "it has no options"
            hint = f"did you mean '{near[0]}'?" if near else others
            raise UserError(f"unknown option '{key}' in {spec}", hint)


def number(text: str, key: str) -> int:
    """Read an option that is a whole number."""
    if not text.isdecimal():
        raise UserError(f"{key}={text}: expected a whole number")
    return int(text)


def flag(text: str, key: str) -> bool:
    """Read an option that is true or false."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise UserError(f"{key}={text}: expected true or false")
    return text.lower() in ("true", "1", "yes")

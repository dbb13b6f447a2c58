"""Recipes: TOML files read into the dataclasses of `hmar_cli.settings`, every mistake reported at once.

A recipe says everything about one run. Each section is one dataclass; a section that comes in several kinds
(`[objective]`) names its own by `kind`, and without one is of the first. Settings that a run finds out (class
count, latent scale) are filled in by the commands, and the resolved recipe is stored with every checkpoint.

A file is complete in itself or begins with `extends = "NAME"` (a shipped recipe, or a file beside it), and a
section may take the section of another recipe by `extends = "NAME"`.
"""

import difflib
import importlib.resources
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli
import tomli_w

from hmar_cli.errors import UserError
from hmar_cli.settings import Recipe, impossible_combinations

# Finding and loading


def recipe_folder() -> Path:
    """The folder of the shipped recipes: in the installed package, or `recipes/` of the checkout."""
    try:
        return Path(str(importlib.resources.files("hmar_cli.recipes")))
    except ModuleNotFoundError:  # run from a checkout that is not installed
        return Path(__file__).resolve().parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted so that d8 comes before d16."""
    names = (path.stem for path in recipe_folder().glob("*.toml"))
    return sorted(
        names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )


def recipe_path(name_or_path: str, beside: Path | None = None) -> Path:
    """The file of a shipped recipe's name, or of a path (which ends in `.toml` or contains a `/`).

    Args:
        name_or_path: what the user wrote.
        beside: the folder that relative paths start from; by default the current one.

    Raises:
        UserError: no such recipe or file.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        path = (beside or Path()) / Path(name_or_path).expanduser()
        if not path.is_file():
            raise UserError(f"no recipe file {path}", "check the path, or give a name of `hmar recipes list`")
        return path
    path = recipe_folder() / f"{name_or_path}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, recipe_names(), 1, 0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no recipe named {name_or_path!r}", hint + "`hmar recipes list` names them all")
    return path


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a shipped recipe by name, or a recipe file by path.

    Args:
        name_or_path: `hmar-d16`, or a path such as `./mine.toml`.
        overrides: `section.key=value`, the value as TOML writes it; what is no TOML is taken as a string.
            They act after all `extends`, in order.

    Raises:
        UserError: no such recipe, or mistakes in it or in the overrides; all of them are in `details`.
    """
    problems: list[str] = []
    path = recipe_path(name_or_path)
    table = _load_table(path, (), problems)
    whole = not problems
    table = _lay(_overrides(overrides, problems), table, Path(), (), problems)
    table.setdefault("name", path.stem)
    return _checked(table, problems, f"recipe {name_or_path}", whole)


def recipe_from_dict(table: Mapping[str, Any]) -> Recipe:
    """Check a resolved recipe (one without `extends`, as `to_toml` writes it).

    Raises:
        UserError: mistakes; all of them are in `details`.
    """
    return _checked(table, [], f"recipe {table.get('name', '')}".rstrip())


def settings_from_dict(table: Mapping[str, Any], cls: type[Any], section: str) -> Any:
    """Check some settings of one section by themselves; what is not given has its default.

    Args:
        table: settings by name, as TOML's types.
        cls: the section's dataclass.
        section: its name, for messages.

    Raises:
        UserError: unknown settings or wrong values; all of them are in `details`.
    """
    problems: list[str] = []
    settings = _section(table, cls, section, problems)
    if problems:
        raise UserError(
            f"[{section}] cannot be set so",
            "`hmar recipes show NAME` prints every setting of a recipe",
            problems,
        )
    return settings


def toml_value(text: str) -> Any:
    """The value that a text stands for as TOML writes it; what is no TOML is taken as a string."""
    try:
        parsed = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def to_toml(recipe: Recipe) -> str:
    """Write every setting; `recipe_from_dict(tomli.loads(...))` gives the same recipe back."""
    text = tomli_w.dumps(to_dict(recipe))
    # tomli_w spreads lists over lines; no list of a recipe holds strings, so each can be folded
    return re.sub(r"= \[\n.*?\n\]$", lambda found: _fold(found.group()), text, flags=re.MULTILINE | re.DOTALL)


def to_dict(settings: Any) -> dict[str, Any]:
    """A recipe, or one of its sections, as TOML's types; a setting that is None is left out."""
    table = {"kind": settings.kind} if hasattr(settings, "kind") else {}
    for name in (each.name for each in fields(settings)):
        value = getattr(settings, name)
        if value is not None:
            table[name] = to_dict(value) if is_dataclass(value) else _plain(value)
    return table


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of a table by their full name, "section.key"."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def _fold(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).replace("[ ", "[").replace(", ]", "]").replace(",]", "]")


def _checked(table: Mapping[str, Any], problems: list[str], what: str, whole: bool = True) -> Recipe:
    """The recipe of a table, or all that is wrong with it, added to what was already found.

    Defaults stand in for wrong values; what follows from a stand-in, or from a file that could not be read
    (the table is not `whole`), is no mistake.
    """
    recipe: Recipe = _section(table, Recipe, "", problems)
    wrong = _settings_in(problems)
    combinations = impossible_combinations(recipe) if whole else []
    problems.extend(each for each in combinations if not wrong & _settings_in([each]))
    if not problems:
        return recipe
    count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
    raise UserError(
        f"{what} has {count}", "`hmar recipes show NAME` prints every setting of a recipe", problems
    )


def _settings_in(problems: Sequence[str]) -> set[str]:
    """Settings (`train.seed`) and sections (`[train]`) that are mentioned; a kind stands for its section."""
    text = "\n".join(problems)
    sections = {f"[{name}]" for name in re.findall(r"^([a-z]+)(?:\.kind)?:", text, re.MULTILINE)}
    return sections | set(re.findall(r"[a-z]+\.[a-z][a-z_0-9]*|\[[a-z]+\]", text))


# Layers of tables: parents, the file itself, overrides


def _load_table(path: Path, chain: tuple[Path, ...], problems: list[str]) -> dict[str, Any]:
    """Read a file and whatever it extends into one table without `extends`."""
    path = path.resolve()
    try:
        table = tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path.name}: not valid TOML: {error}")
        return {}
    chain = (*chain, path)
    parent: dict[str, Any] = {}
    if "extends" in table:
        parent = _parent(table.pop("extends"), "extends", path.parent, chain, problems)
        parent = {key: value for key, value in parent.items() if key not in ("name", "description")}
    return _lay(table, parent, path.parent, chain, problems)


def _parent(
    name: Any, where: str, folder: Path, chain: tuple[Path, ...], problems: list[str]
) -> dict[str, Any]:
    """The table of another recipe; {} with a problem noted if there is none, or if it leads back here."""
    if not isinstance(name, str):
        problems.append(f"{where}: expected the name or path of a recipe, got {_show(name)}")
        return {}
    try:
        path = recipe_path(name, folder).resolve()
    except UserError as error:
        problems.append(f"{where}: {error}; {error.hint}")
        return {}
    if path in chain:
        circle = " -> ".join(each.stem for each in (*chain[chain.index(path) :], path))
        problems.append(f"{where}: recipes extend each other in a circle: {circle}")
        return {}
    return _load_table(path, chain, problems)


def _lay(
    table: dict[str, Any], base: dict[str, Any], folder: Path, chain: tuple[Path, ...], problems: list[str]
) -> dict[str, Any]:
    """Lay `table` over `base`, setting by setting; a section that changes its kind starts anew."""
    merged = dict(base)
    for key, value in table.items():
        if not isinstance(value, dict):
            merged[key] = value
            continue
        section, below = dict(value), merged.get(key)
        if "extends" in section:
            below = _parent(section.pop("extends"), f"{key}.extends", folder, chain, problems).get(key)
        if not isinstance(below, dict) or section.get("kind", _kind_of(key, below)) != _kind_of(key, below):
            below = {}
        merged[key] = {**below, **section}
    return merged


def _kind_of(section: str, table: Mapping[str, Any]) -> Any:
    """The kind that a section's table names, or the first of that section."""
    return table.get("kind", next((kind for name, kind, _ in _all_settings() if name == section), ""))


def _overrides(texts: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Turn `section.key=value` texts into a table."""
    table: dict[str, Any] = {}
    for text in texts:
        path, equals, written = text.partition("=")
        *sections, key = path.strip().split(".")
        if not equals or not key or len(sections) > 1:
            problems.append(f"--set {text}: expected section.key=value, for instance train.batch_size=64")
            continue
        target = table.setdefault(sections[0], {}) if sections else table
        if not isinstance(target, dict):
            problems.append(f"--set {text}: {sections[0]} is set to a value already")
            continue
        target[key] = toml_value(written.strip())
    return table


# Checking one table against the dataclasses

_BAD: Any = object()  # stands for a value whose problem has been noted


def _section(table: Any, cls: type[Any], path: str, problems: list[str]) -> Any:
    """Build one dataclass from a table, noting each unknown key and wrong value (its default stands in)."""
    if not isinstance(table, Mapping):
        problems.append(f"{path}: expected a section of settings, got {_show(table)}")
        return _BAD
    hints = get_type_hints(cls, include_extras=True)
    known = {each.name: hints[each.name] for each in fields(cls)}
    values = {}
    for key, value in table.items():
        where = f"{path}.{key}" if path else key
        if key in known:
            values[key] = _value(value, known[key], where, problems)
        elif key == "kind" and hasattr(cls, "kind"):
            if value != cls.kind:
                problems.append(f'{where}: expected "{cls.kind}", got {_show(value)}')
        else:
            problems.append(
                f"{where}: unknown {'setting' if path else 'section'}{_nearest(key, path, known)}"
            )
    return cls(**{key: value for key, value in values.items() if value is not _BAD})


def _value(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    """Convert one value to its annotation; `_BAD` if it does not fit, with the problem noted."""
    sections = [each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)]
    if len(sections) > 1:
        return _kind(value, sections, path, problems)
    if sections:
        return _section(value, sections[0], path, problems)
    converted = _fit(value, hint)
    if converted is _BAD:
        problems.append(f"{path}: expected {_describe(hint)}, got {_show(value)}")
    return converted


def _kind(table: Any, sections: Sequence[type[Any]], path: str, problems: list[str]) -> Any:
    """Build the section whose kind the table names."""
    kinds = {section.__dict__["kind"]: section for section in sections}
    kind = table.get("kind", next(iter(kinds))) if isinstance(table, Mapping) else None
    if kind in list(kinds):  # whatever was written, a list too
        return _section(table, kinds[kind], path, problems)
    if kind is None:
        problems.append(f"{path}: expected a section of settings, got {_show(table)}")
    else:
        choices = " or ".join(f'"{each}"' for each in kinds)
        problems.append(f"{path}.kind: expected {choices}, got {_show(kind)}")
    return _BAD


def _fit(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or `_BAD`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = _fit(value, arguments[0])
        return number if number is not _BAD and number in arguments[1] else _BAD
    if origin is Literal:
        return value if any(value == each and type(value) is type(each) for each in arguments) else _BAD
    if origin in (Union, types.UnionType):
        return next((fit for each in arguments if (fit := _fit(value, each)) is not _BAD), _BAD)
    if origin is tuple or origin is Sequence:
        return _fit_list(value, arguments, pair=origin is Sequence)
    if hint is types.NoneType:
        return None if value == "none" else _BAD
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is hint else _BAD


def _fit_list(value: Any, arguments: tuple[Any, ...], pair: bool) -> Any:
    """`value` as a tuple: of any length for `X, ...`, a height and a width for a `Side`, else one each."""
    if not isinstance(value, (list, tuple)):
        return _BAD
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    elif pair:
        arguments = arguments * 2
    if len(arguments) != len(value):
        return _BAD
    fitted = tuple(_fit(each, hint) for each, hint in zip(value, arguments, strict=True))
    return _BAD if any(each is _BAD for each in fitted) else fitted


def _describe(hint: Any) -> str:
    """An annotation in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_describe(arguments[0])}{arguments[1]}"
    if origin is Literal:
        return " or ".join(_show(each) for each in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(each) for each in arguments)
    if origin is Sequence:
        return "[height, width]"
    if origin is tuple:
        inner = _describe(arguments[0])
        return (
            f"a list, each {inner}"
            if arguments[-1] is Ellipsis
            else f"a list of {len(arguments)}, each {inner}"
        )
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}.get(
        hint, '"none"'
    )


def _show(value: Any) -> str:
    text = (
        str(value).lower()
        if isinstance(value, bool)
        else f'"{value}"'
        if isinstance(value, str)
        else str(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."


_ALIASES = {"lr": "base_lr", "learning_rate": "base_lr"}
"""What other programs call a setting."""


def _nearest(key: str, path: str, known: Mapping[str, Any]) -> str:
    """What an unknown key may have meant: the same key elsewhere, a similar one here, or elsewhere; or nothing."""
    key = _ALIASES.get(key, key)
    here = {name: f"{path}.{name}" if path else f"[{name}]" for name in known}
    everywhere = {name: f"{section}.{name}" for section, _, name in _all_settings()}
    kinds = [kind for section, kind, name in _all_settings() if (section, name) == (path, key)]
    if kinds and key not in known:
        return f'; {path}.kind = "{kinds[0]}" has it, this kind has not'
    if path and key in everywhere:
        return f"; did you mean {everywhere[key]}?"
    for names in (here, everywhere):
        if near := difflib.get_close_matches(key, names, 1, 0.6):
            return f"; did you mean {names[near[0]]}?"
    return "" if known else f"; {path} has no settings"


def _all_settings() -> Iterator[tuple[str, str, str]]:
    """Every (section, its kind, setting), for suggestions."""
    for section, hint in get_type_hints(Recipe).items():
        for cls in (hint, *get_args(hint)):
            if isinstance(cls, type) and is_dataclass(cls):
                yield from ((section, getattr(cls, "kind", ""), each.name) for each in fields(cls))

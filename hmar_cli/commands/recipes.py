"""`hmar recipes`: list, show, compare and check recipes."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from hmar_cli.errors import UserError
from hmar_cli.recipe import flat, load_recipe, recipe_names, recipe_path, to_dict, to_toml
from hmar_cli.settings import Classifier, MaskedAr, Msvq, NextScale, Recipe
from hmar_cli.sizes import model_parameters

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="List, show, compare and check recipes."
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated.")
]


@app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """List the shipped recipes.

    Examples:

    `hmar recipes list`

    `hmar recipes list --json`
    """
    rows = [_summary(load_recipe(name)) for name in recipe_names()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for header in ("recipe", "what", "data", "pixels", "tokens", "params"):
        words = header in ("recipe", "what", "data")
        # in a narrow terminal the data's name is cut, which is one word; names and numbers stay whole
        table.add_column(header, justify="left" if words else "right", no_wrap=header != "data")
    for row in rows:
        table.add_row(*(_cell(row, str(column.header)) for column in table.columns))
    Console(markup=False).print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name or path of a recipe.")],
    overrides: Overrides = None,
    raw: Annotated[bool, typer.Option("--raw", help="Print the file as it is, with its comment.")] = False,
    as_json: Json = False,
) -> None:
    """Print every setting of a recipe as TOML, with what it extends filled in.

    Examples:

    `hmar recipes show hmar-d16`

    `hmar recipes show hmar-d16 --set train.batch_size=64 > mine.toml`

    `hmar recipes show hmar-d16 --raw`
    """
    if raw:
        if overrides or as_json:
            raise UserError("--raw prints the file as it is", "leave out --set and --json")
        print(recipe_path(name).read_text(encoding="utf-8"), end="")
        return
    recipe = load_recipe(name, overrides or ())
    print(json.dumps(to_dict(recipe), indent=2) if as_json else to_toml(recipe).rstrip())


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="Name or path of a recipe.")],
    second: Annotated[str, typer.Argument(help="Name or path of another.")],
    as_json: Json = False,
) -> None:
    """Print the settings in which two recipes differ, side by side.

    Examples:

    `hmar recipes diff var-d16 hmar-d16`

    `hmar recipes diff hmar-d16 ./mine.toml --json`
    """
    ours, theirs = (flat(to_dict(load_recipe(name))) for name in (first, second))
    keys = [key for key in {**ours, **theirs} if key not in ("name", "description")]
    differing = {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}
    if as_json:
        print(json.dumps({key: {first: a, second: b} for key, (a, b) in differing.items()}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", first, second, box=None, header_style="bold")
    for key, values in differing.items():
        table.add_row(key, *(Text("" if value is None else json.dumps(value)) for value in values))
    Console(markup=False).print(table if differing else "the same settings")


@app.command()
def validate(
    files: Annotated[
        list[str] | None, typer.Argument(help="Recipe names or files; by default all shipped ones.")
    ] = None,
) -> None:
    """Check every shipped recipe, or the files given; exit code 2 if there are mistakes, all printed.

    Examples:

    `hmar recipes validate`

    `hmar recipes validate mine.toml other.toml`
    """
    names = files or recipe_names()
    problems = [f"{name}: {mistake}" for name in names for mistake in _mistakes(name)]
    if problems:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        raise UserError(
            f"{count} in {len(names)} recipe(s)", "`hmar recipes show NAME` prints a valid one", problems
        )
    print(f"{len(names)} recipes are valid" if len(names) > 1 else f"{names[0]} is valid")


def _mistakes(name: str) -> tuple[str, ...]:
    try:
        load_recipe(name)
    except UserError as error:
        return error.details or (str(error),)
    return ()


def _summary(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "what": _family(recipe),
        "description": recipe.description,
        "data": _data(recipe.data.source),
        "size": recipe.data.size,
        "tokens": _tokens(recipe),
        "pivots": _pivots(recipe),
        "parameters": model_parameters(recipe),
    }


def _cell(row: dict[str, Any], column: str) -> str:
    """A cell of the table of recipes."""
    if column == "tokens":
        return f"{row['pivots']}+{row['tokens']}" if row["pivots"] else str(row["tokens"] or "")
    if column == "params":
        return f"{row['parameters'] / 1e6:.0f}M" if row["parameters"] else ""
    return str(row[{"recipe": "name", "pixels": "size"}.get(column, column)])


def _data(source: str) -> str:
    """A short name of a source."""
    if source.startswith("coco:"):
        return "coco"
    path = Path(source.removeprefix("builtin:").partition("?")[0])
    return path.parent.name if path.name == "train" else path.stem.removesuffix("-train")


def _family(recipe: Recipe) -> str:
    """What a recipe trains, in a word or two."""
    model = recipe.model
    if isinstance(model, NextScale):
        family = {"causal": "VAR", "diagonal": "HMAR"}[model.pattern]
        return f"{family}, masked" if recipe.objective.kind == "masked" else family
    if isinstance(model, MaskedAr):
        family = "MAR" if model.pivots == "none" else "Hi-MAR"
        return f"{family}, text" if recipe.text else family
    if isinstance(model, Classifier):
        return "classifier"
    return "tokenizer" if isinstance(recipe.tokenizer, Msvq) else "KL tokenizer"


def _tokens(recipe: Recipe) -> int:
    """Tokens of an image, without pivots; 0 for a classifier."""
    if isinstance(recipe.model, Classifier):
        return 0
    return recipe.scales.total if isinstance(recipe.tokenizer, Msvq) else math.prod(recipe.grid)


def _pivots(recipe: Recipe) -> int:
    """Low-resolution tokens in front of the dense ones."""
    with_pivots = isinstance(recipe.model, MaskedAr) and recipe.model.pivots != "none"
    return math.prod(recipe.pivot_grid) if with_pivots and recipe.pivot_grid else 0

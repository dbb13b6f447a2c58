"""`hmar curves`: plot what runs measured while they trained."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hmar_cli.commands.flags import short_names
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hmar_cli.settings import Recipe

TASKS = {"next-scale": "next-scale prediction", "masked": "masked finetuning"}
"""What runs learn, by the kind of their objective, where that does not say it."""

EXAMPLES = """
Plot a metric of one or several runs over training, as a whole and for every scale.

A next-scale accuracy of 4 to 6 % is normal: most tokens are fine detail that no model could foretell. The early and
middle scales are what image quality follows (HMAR supplement, Fig. 16).

**Examples**

- `hmar curves runs/himar-cifar10 --metric dense_loss --out dense.png`
- `hmar curves runs/var-cifar10 runs/hmar-cifar10 --out curves.png`
- `hmar curves runs/hmar-cifar10 --metric cross_entropy`
- `hmar curves runs/msvq-tiny --metric psnr --json`
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("curves", help=EXAMPLES)(curves)


def curves(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    metric: Annotated[
        str, typer.Option(help="Name in metrics.jsonl, such as accuracy or psnr.")
    ] = "accuracy",
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("curves.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print each run's last row as JSON.")] = False,
) -> None:
    """Plot; the help text is `EXAMPLES`."""
    from hmar_cli.console import console
    from hmar_cli.recipe import load_recipe
    from hmar_cli.report import plot_curves
    from hmar_cli.training.logging import read_rows

    missing = [run for run in runs if not (run / "metrics.jsonl").is_file()]
    if missing:
        raise UserError(f"no metrics.jsonl in {missing[0]}", "give the folders of training runs")
    rows = {name: read_rows(run / "metrics.jsonl") for name, run in zip(short_names(runs), runs, strict=True)}
    empty = [str(run) for run, measured in zip(runs, rows.values(), strict=True) if not measured]
    if empty:
        raise UserError(f"{empty[0]} has measured nothing yet", "train.log_every says after how many steps")
    paths = [run / "recipe.toml" for run in runs]
    recipes = [load_recipe(str(path)) if path.is_file() else None for path in paths]
    tasks = [f" ({TASKS.get(kind := each.objective.kind, kind)})" if each else "" for each in recipes]
    legend = {name + task: found for (name, found), task in zip(rows.items(), tasks, strict=True)}
    try:
        plot_curves(legend, metric.removesuffix("_per_scale"), out, scale_grids(recipes))
    except ValueError as error:
        known = sorted({key.removesuffix("_per_scale") for r in rows.values() for row in r for key in row})
        raise UserError(f"no run measured {metric!r}", f"they have {', '.join(known)}") from error
    console.print(f"curves of {', '.join(rows)} in {out}")
    if as_json:
        print(json.dumps({name: measured[-1] for name, measured in rows.items()}, indent=2))


def scale_grids(recipes: "Sequence[Recipe | None]") -> list[str]:
    """Names of the token grids of the runs' scales, such as "4x4"; none if they differ, or are not known."""
    from hmar_cli.settings import Msvq, grid_name

    lists = {each.scales.grids if each and isinstance(each.tokenizer, Msvq) else () for each in recipes}
    return [grid_name(grid) for grid in lists.pop()] if len(lists) == 1 else []

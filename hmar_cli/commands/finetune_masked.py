"""`hmar finetune-masked`: train HMAR's masked branch on a trained next-scale model."""

from typing import Annotated

import typer

from hmar_cli.commands.train import (
    Data,
    Device,
    DryRun,
    Json,
    Launch,
    NoEma,
    Out,
    Resume,
    Set,
    Wandb,
    conclude,
    resolve,
)
from hmar_cli.errors import UserError

EXAMPLES = """
Train HMAR's masked branch, which refines what the next-scale model drew.

The last blocks and the head of BASE are copied and trained, with a new mask embedding; all else is frozen.
The result holds both branches, so that `hmar sample` can draw with any refinement schedule.

**Examples**

- `hmar finetune-masked runs/hmar-tiny --data caches/shapes`
- `hmar finetune-masked runs/hmar-cifar10 --data caches/cifar10 --set objective.leak_free=true`
- `hmar finetune-masked runs/hmar-d16 --data caches/imagenet --recipe hmar-d16-masked --launch 8`
- `hmar finetune-masked runs/hmar-cifar10 --data caches/cifar10 --resume`
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("finetune-masked", help=EXAMPLES)(finetune_masked)


def finetune_masked(
    base: Annotated[str, typer.Argument(help="Checkpoint or run folder of a next-scale model.")],
    data: Data = "",
    recipe: Annotated[str, typer.Option(help="Name or path. [default: the base's recipe and -masked]")] = "",
    out: Out = "",
    overrides: Set = None,
    resume: Resume = False,
    launch: Launch = 0,
    device: Device = "",
    no_ema: NoEma = False,
    wandb: Wandb = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Finetune; the help text is `EXAMPLES`."""
    from hmar_cli.launch import check_device, delegate

    check_device(device)
    resolved = resolve(recipe or default_recipe(base), overrides or [], no_ema, "")
    delegate(launch, device)
    from hmar_cli.runs import Options
    from hmar_cli.runs import finetune_masked as run

    options = Options(data=data, out=out, resume=resume, device=device, wandb=wandb, dry_run=dry_run)
    conclude(run(base, resolved, options), resolved, as_json, dry_run)


def default_recipe(base: str) -> str:
    """The shipped recipe that finetunes a base.

    Raises:
        UserError: none does, or it is no base.
    """
    from hmar_cli.checkpoints.store import open_checkpoint
    from hmar_cli.recipe import recipe_names
    from hmar_cli.runs import check_base

    checkpoint = open_checkpoint(base)
    check_base(checkpoint)
    name = f"{checkpoint.recipe.name.removesuffix('-masked')}-masked"
    if name not in recipe_names():
        raise UserError(
            f"no recipe named '{name}' to finetune {base} with",
            'give one with --recipe: a file with extends = "./NAME.toml" and [objective] kind = "masked"',
        )
    return name

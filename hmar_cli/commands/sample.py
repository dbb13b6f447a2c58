"""`hmar sample`: draw images from a checkpoint."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hmar_cli.commands import drawing
from hmar_cli.commands.flags import given, with_flags
from hmar_cli.errors import UserError

EXAMPLES = """
Draw images of chosen classes or prompts from a checkpoint.

Image i takes label or prompt i modulo their number, and its random numbers depend on the seed and i alone: batch
size, number of processes and order change nothing. A run that was interrupted goes on where it stopped. What is
not given is the recipe's.

**Examples**

- `hmar sample --checkpoint runs/hmar-tiny --count 16`
- `hmar sample --checkpoint runs/hmar-cifar10-masked --labels cat,ship --count 8 --cfg 1.7 --top-k 900`
- `hmar sample --checkpoint runs/hmar-d16-masked --labels 3,7 --schedule none --seed 1`
- `hmar sample --checkpoint runs/hmar-tiny-masked --schedule 1,2,4,1,1,1 --out more-passes`
- `hmar sample --checkpoint runs/var-d16 --count 50000 --npz --launch 8`
- `hmar sample --checkpoint runs/himar-cifar10 --count 64 --steps 8 --pivot-cfg 3 --pivots`
- `hmar sample --checkpoint runs/himar-cifar10 --cfg 1 --head-sampler dpm++ --head-steps 20`
- `hmar sample --checkpoint runs/himar-scenes --prompt "a red circle left of a blue square" --count 4`
- `hmar sample --checkpoint runs/himar-emoji --prompt-file prompts.txt`
"""

WIDEST = 16
"""Most labels that get a column each in the grid; with one label, or more than these, the grid is square."""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("sample", help=EXAMPLES)(sample)


@with_flags
def sample(
    checkpoint: drawing.Checkpoint,
    sampler: drawing.Sampler,
    loading: drawing.Drawing,
    contents: drawing.Contents,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    count: Annotated[int, typer.Option(min=0, help="Images in all; 0 is one a label or prompt.")] = 0,
    pivots: Annotated[
        bool,
        typer.Option(
            "--pivots",
            rich_help_panel=drawing.MASKED_PANEL,
            help="Also write Hi-MAR's low-resolution images.",
        ),
    ] = False,
    batch_size: drawing.BatchSize = 0,
    device: drawing.Device = "",
    npz: Annotated[bool, typer.Option("--npz", help="Also write samples.npz for ADM's evaluator.")] = False,
    columns: Annotated[int, typer.Option(min=0, help="Columns of grid.png; 0 suits the labels.")] = 0,
    launch: drawing.Launch = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be drawn, and stop.")] = False,
    as_json: drawing.AsJson = False,
) -> None:
    """Draw images; the help text is `EXAMPLES`."""
    from hmar_cli.launch import check_device, delegate, leave_processes

    check_device(device)
    order = drawing.place_order(
        checkpoint,
        given(sampler),
        loading,
        labels=contents.labels,
        prompts=contents.prompts(),
        count=count,
        batch_size=batch_size,
    )
    if pivots and getattr(order.checkpoint.recipe.model, "pivots", "none") == "none":
        raise UserError(f"{order.checkpoint.folder} has no pivots to write", "leave out --pivots")
    if not dry_run:
        delegate(launch, device)
    from hmar_cli.console import console
    from hmar_cli.sampling.images import Keep, draw_images

    job = order.job()
    model, codec, about = order.load()
    about |= job.describe()
    if not dry_run:
        width = columns or (len(order.classes) if 1 < len(order.classes) <= WIDEST else 0)
        keep = Keep(columns=width, npz=npz, pivots=pivots)
        summary = draw_images(model, codec, job, out, device, about, keep)
        leave_processes()
        if summary is None:  # not the process that reports
            return
        about |= summary
        console.print(f"{job.count} image{'s' * (job.count > 1)} in {out}, together in {out / 'grid.png'}")
    if dry_run and not as_json:
        drawing.print_plan({**order.outline(), "output": str(out)})
    if as_json:
        print(json.dumps(about, indent=2, ensure_ascii=False))

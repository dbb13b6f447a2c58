"""`hmar analyze`, the sweeps: quality over settings of a sampler, and over models and their training."""

from pathlib import Path
from typing import Annotated

import typer

from hmar_cli.commands.flags import given, with_flags
from hmar_cli.commands.sweeping import (
    Flags,
    Study,
    Training,
    carry_out,
    entries,
    rows_to_train,
    train_and_measure,
)
from hmar_cli.errors import UserError

MEASURED = """
Every setting draws the same images (of the same classes or prompts and noise), and one judge measures them all:
`--extractor` against `--reference`. What the folder has already is not measured again; the grid shows the first
images of each setting. Seconds are those of drawing alone, by the median batch after the first two.

`--set` changes a setting of all models that have it.
"""

VARIED = f"""{MEASURED}
`--vary KEY=VALUES` says what is varied, each key by itself; values stand between commas, schedules between
semicolons.
"""

REFINEMENT = f"""
Quality with one more masked sampling pass at one scale at a time (HMAR supplement D.4, Fig. 20).

The first row is the schedule as it is: no refinement, or that of `--set schedule=...`. Passes share the tokens of a
scale by MaskGIT's cosine law. In the paper, passes at the early scales help most.
{MEASURED}
**Examples**

- `hmar analyze refinement runs/hmar-masked --reference cifar10-test.parquet --extractor runs/classifier-cifar10`
- `hmar analyze refinement runs/hmar-d16-masked --reference VIRTUAL_imagenet256_labeled.npz --count 50000 --launch 8`
- `hmar analyze refinement runs/hmar-masked --set "schedule=1,2,2,1,1,1" --reference photos/ --extractor runs/judge`
"""

GUIDANCE = f"""
Quality over classifier-free guidance (HMAR supplement D.4, Fig. 21), of any of the four families.

Guidance trades diversity for fidelity: FID has a minimum, while the Inception Score goes on growing for longer.
{VARIED}
**Examples**

- `hmar analyze guidance runs/var runs/hmar --reference cifar10-test.parquet --extractor runs/classifier-cifar10`
- `hmar analyze guidance runs/himar --vary cfg=1,2,3 --vary pivot_cfg=1,2,3 --reference photos/ --extractor judge/`
- `hmar analyze guidance runs/hmar-d16 --reference VIRTUAL_imagenet256_labeled.npz --count 50000 --launch 8`
"""

SPEED = f"""
Quality against the time that an image takes (Hi-MAR, section 4.5 and Fig. 3).

By default MAR's autoregressive steps are varied, those of Hi-MAR's second phase, and nothing of VAR and HMAR.
Compare times of one device and batch size only; the paper's are of batches of 128 on an H100.
{VARIED}
**Examples**

- `hmar analyze speed runs/mar runs/himar --reference cifar10-test.parquet --extractor runs/classifier-cifar10`
- `hmar analyze speed runs/himar --vary head_steps=5,10,25 --batch-size 128 --reference stats.npz --count 50000`
- `hmar analyze speed runs/hmar-masked --vary "schedule=none;1,2,2,1,1,1;single" --reference stats.npz --count 50000`
"""

PHASES = f"""
Quality over the autoregressive steps of Hi-MAR's two phases, one at a time (section 4.5 and Fig. 4).

The other phase keeps the steps of the recipe, or of `--set`. In the paper 32 steps of the first phase (for 64 pivots)
and 4 of the second are enough.
{VARIED}
**Examples**

- `hmar analyze phases runs/himar --reference cifar10-test.parquet --extractor runs/classifier-cifar10`
- `hmar analyze phases runs/himar-b --set pivot_steps=32 --vary steps=1,2,4,8,16 --reference stats.npz --count 50000`
"""

ABLATION = f"""
The quality of several models under one protocol, a row each, with what tells them apart (Hi-MAR's Table 5).

Give checkpoints that are trained, or `--train CACHE` and names of recipes: then each is trained first, one after the
other, in a folder of `--runs`, and a run that was stopped goes on. Without names they are the six rows of the table
at the size of CIFAR-10. With several `--train-seeds` each recipe is trained with each, and a summary has the spread.

{MEASURED}
**Examples**

- `hmar analyze ablation runs/mar runs/himar-visual runs/himar --reference photos/ --extractor runs/judge`
- `hmar analyze ablation --train caches/cifar10-kl --reference cifar10-test.parquet --extractor runs/judge`
- `hmar analyze ablation mar-tiny himar-tiny --train caches/shapes --train-seeds 0,1 --train-set train.steps=2000
  --reference "builtin:shapes?seed=1" --extractor runs/classifier-tiny --metrics fid,precision,recall`
"""

TABLE_5 = (
    "mar-cifar10",
    "himar-cifar10-visual",
    "himar-cifar10-mlp",
    "himar-cifar10-no-scale",
    "himar-cifar10-transformer-pivots",
    "himar-cifar10",
)
"""Recipes of the rows of Hi-MAR's Table 5, in its order."""

Checkpoints = Annotated[
    list[Path],
    typer.Argument(help="Checkpoints or run folders.", show_default=False, metavar="CHECKPOINT..."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `hmar analyze`."""
    app.command("refinement", help=REFINEMENT)(refinement)
    app.command("guidance", help=GUIDANCE)(guidance)
    app.command("speed", help=SPEED)(speed)
    app.command("phases", help=PHASES)(phases)
    app.command("ablation", help=ABLATION)(ablation)


@with_flags
def refinement(checkpoints: Checkpoints, flags: Flags) -> None:
    """Draw Fig. 20; the help text is `REFINEMENT`."""
    from hmar_cli.analysis import studies

    study = Study(
        name="refinement",
        values=studies.refinement_values,
        draw=studies.draw_refinement,
        base="always",
        start={"schedule": "none"},
        varies=False,
    )
    carry_out(study, entries(checkpoints), flags)


@with_flags
def guidance(checkpoints: Checkpoints, flags: Flags) -> None:
    """Draw Fig. 21; the help text is `GUIDANCE`."""
    from hmar_cli.analysis import studies

    study = Study(name="guidance", metrics="fid,is", values=studies.guidance_values, draw=studies.draw_curves)
    carry_out(study, entries(checkpoints), flags)


@with_flags
def speed(checkpoints: Checkpoints, flags: Flags) -> None:
    """Draw Hi-MAR's Fig. 3; the help text is `SPEED`."""
    from hmar_cli.analysis import studies

    study = Study(name="speed", values=studies.speed_values, draw=studies.draw_speed, base="alone")
    carry_out(study, entries(checkpoints), flags)


@with_flags
def phases(checkpoints: Checkpoints, flags: Flags) -> None:
    """Draw Hi-MAR's Fig. 4; the help text is `PHASES`."""
    from hmar_cli.analysis import studies

    study = Study(name="phases", values=studies.phase_values, draw=studies.draw_curves, lacking="two phases")
    carry_out(study, entries(checkpoints), flags)


@with_flags
def ablation(
    flags: Flags,
    training: Training,
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(help="Checkpoints or run folders; with --train names of recipes.", show_default=False),
    ] = None,
    train: Annotated[str, typer.Option(help="Cache on which recipes are trained first.")] = "",
    runs: Annotated[Path, typer.Option(help="Folder of their runs.")] = Path("runs/ablation"),
) -> None:
    """Draw Hi-MAR's Table 5; the help text is `ABLATION`."""
    from hmar_cli.analysis import studies

    study = Study(
        name="ablation",
        draw=studies.draw_ablation,
        base="always",
        row=studies.ablation_row,
        varies=False,
    )
    if train:
        from hmar_cli.recipe import load_recipe

        names = checkpoints or TABLE_5
        recipes = {Path(name).stem: load_recipe(name, training.train_set or []) for name in names}
        train_and_measure(study, rows_to_train(recipes, training.train_seeds, runs), train, flags)
        return
    if wasted := list(given(training)):
        raise UserError(
            f"--{wasted[0].replace('_', '-')} is for --train", "give the cache to train on, or leave it out"
        )
    if not checkpoints:
        raise UserError(
            "no checkpoints to measure", "give some, or --train CACHE to train the recipes of the table"
        )
    carry_out(study, entries([Path(each) for each in checkpoints]), flags)

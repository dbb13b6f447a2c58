"""`hmar train`: train a tokenizer or a classifier on images, or a model on a cache."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.settings import Recipe
    from hmar_cli.training.trainer import Outcome

EXAMPLES = """
Train a tokenizer or a classifier on images, or a model on a cache of tokens or latents.

The run folder gets checkpoints, `metrics.jsonl`, TensorBoard files and pictures. Ctrl-C finishes the step
and saves; `--resume` goes on from the newest checkpoint, on a CPU with exactly the numbers of a run never stopped.

**Examples**

- `hmar train --recipe msvq-tiny --data builtin:shapes`
- `hmar train --recipe msvq-cifar10 --data cifar10-train.parquet --out runs/tokenizer`
- `hmar train --recipe hmar-cifar10 --data caches/cifar10 --set train.batch_size=512 --set train.steps=2000`
- `hmar train --recipe hmar-cifar10 --data caches/cifar10 --resume`
- `hmar train --recipe hmar-d16 --data caches/imagenet --launch 8`
- `hmar train --recipe kl-tiny`
- `hmar train --recipe himar-l --data caches/imagenet-latents --launch 8`
- `hmar train --recipe himar-scenes --data caches/scenes --set text.depth=6`
- `hmar train --recipe hmar-tiny --data caches/pets --init runs/hmar-tiny --out runs/pets`
- `hmar train --recipe var-d16 --data caches/imagenet --dry-run`
- `hmar train --recipe var-d36-512 --dry-run`
- `hmar train --recipe classifier-cifar10 --data cifar10-train.parquet`
"""

# Flags that `hmar finetune-masked` shares
Data = Annotated[str, typer.Option(help="Cache folder (models) or image source (tokenizers, classifiers).")]
Out = Annotated[str, typer.Option(help="Run folder. [default: runs/ and the recipe's name]")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run folder.")]
Launch = Annotated[int, typer.Option(min=0, help="Share the work over this many processes.")]
Device = Annotated[str, typer.Option(help="cpu or cuda. [default: a GPU where there is one]")]
NoEma = Annotated[bool, typer.Option("--no-ema", help="Keep no running average of the weights.")]
Wandb = Annotated[bool, typer.Option("--wandb", help="Also report to Weights & Biases.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan, run one step if there is data, write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("train", help=EXAMPLES)(train)


def train(
    recipe: Annotated[str, typer.Option(help="Name or path. [default with --resume: the run's own]")] = "",
    data: Data = "",
    tokenizer: Annotated[str, typer.Option(help="Checkpoint that the cache must have been made by.")] = "",
    out: Out = "",
    overrides: Set = None,
    resume: Resume = False,
    init: Annotated[str, typer.Option(help="Start from the weights of this checkpoint.")] = "",
    launch: Launch = 0,
    device: Device = "",
    no_ema: NoEma = False,
    wandb: Wandb = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train; the help text is `EXAMPLES`."""
    from hmar_cli.launch import check_device, delegate

    resolved = resolve(recipe, overrides or [], no_ema, out if resume else "")
    check_device(device)
    delegate(launch, device)
    from hmar_cli.runs import Options
    from hmar_cli.runs import train as run

    options = Options(
        data=data,
        tokenizer=tokenizer,
        out=out,
        init=init,
        resume=resume,
        device=device,
        wandb=wandb,
        dry_run=dry_run,
    )
    conclude(run(resolved, options), resolved, as_json, dry_run)


def resolve(name: str, overrides: list[str], no_ema: bool, resumed: str) -> "Recipe":
    """Load a recipe, or that of the run to resume.

    Raises:
        UserError: neither is given, or mistakes in the recipe.
    """
    from pathlib import Path

    from hmar_cli.recipe import load_recipe

    if not name:
        if not resumed:
            raise UserError("--recipe is missing", "`hmar recipes list` shows what there is")
        path = Path(resumed) / "recipe.toml"
        if not path.is_file():
            raise UserError(
                f"no run to resume in {resumed}", "give the --out of the run, or leave out --resume"
            )
        name = str(path)
    recipe = load_recipe(name, overrides)
    return replace(recipe, train=replace(recipe.train, ema=0.0)) if no_ema else recipe


def conclude(outcome: "Outcome", recipe: "Recipe", as_json: bool, dry_run: bool) -> None:
    """Say where the result is and what comes next; leave with 128 + signal after an interrupted run.

    Args:
        outcome: what the trainer returned.
        recipe: its recipe.
        as_json: print the outcome on standard output.
        dry_run: only a plan was made.
    """
    import json

    from hmar_cli.console import console
    from hmar_cli.launch import leave_processes

    leave_processes()  # while all is well: threads that Python's shutdown meets can abort it
    if outcome.main:
        if dry_run:
            for line in plan_lines(outcome, recipe):
                console.print(line, highlight=False)
        else:
            for line in next_lines(outcome, recipe):
                console.print(line, highlight=False, soft_wrap=True)
        if as_json:
            print(json.dumps(asdict(outcome) | {"recipe": recipe.name}, indent=2, default=str))
    if outcome.interrupted:
        raise typer.Exit(128 + outcome.interrupted)


def plan_lines(outcome: "Outcome", recipe: "Recipe") -> list[str]:
    """The plan of a run, for people."""
    plan, last, epoch = outcome.plan, outcome.last, outcome.plan.steps_per_epoch
    lines = [
        f"{name}: {plan.parameters[name]:,} parameters, {plan.trainable[name]:,} trained"
        for name in plan.parameters
    ]
    length = f"{plan.steps:,} steps" if plan.steps else f"{recipe.train.epochs:g} epochs in steps"
    lines += [
        f"data: {outcome.data}" + (f"; {round(epoch, 2):,.10g} steps an epoch" if epoch else ""),
        f"length: {length} of {recipe.train.batch_size} images"
        + (f", {plan.steps / epoch:.4g} epochs" if epoch else ""),
        f"processes: {plan.world} on {plan.device}, {plan.precision}; "
        f"{recipe.train.accumulate} micro-batches of {plan.micro_batch} images a step",
        f"memory of weights, gradients, moments and averages: {gib(plan.memory_bytes)} a process",
    ]
    if last and outcome.peak_memory_bytes:
        lines.append(f"largest memory in one step: {gib(outcome.peak_memory_bytes)}")
    if last:
        speed = f"{last['images_per_second']:,.1f} images/s (start-up included)"
        lines.append(f"one step: loss {last['loss']:.4f}, {speed}")
    return lines


def gib(size: int) -> str:
    """A size in GiB."""
    return f"{size / 2**30:.3g} GiB"


def next_lines(outcome: "Outcome", recipe: "Recipe") -> list[str]:
    """Where the run ended, and the next command to try."""
    if outcome.interrupted:
        where = outcome.checkpoint.parent if outcome.checkpoint else ""
        return [
            f"interrupted at step {outcome.step} of {outcome.plan.steps}; saved {outcome.checkpoint}",
            f"hint: the same command with --resume goes on from there (--out {where})",
        ]
    lines = [f"checkpoint: {outcome.checkpoint}"]
    if "loss" in outcome.last:
        lines.insert(0, f"step {outcome.step}: {summary(outcome.last)}")
    if unusable := outcome.last.get("unusable_images"):
        lines.insert(0, f"{unusable:,} images could not be used, so others took their places")
    if recipe.model is None:
        lines.append(
            f"next: hmar tokenize SOURCE --tokenizer {outcome.checkpoint} --out caches/{recipe.name}"
        )
    elif recipe.model.kind == "classifier":
        lines.append(f"next: hmar eval samples FOLDER --reference SOURCE --extractor {outcome.checkpoint}")
    else:
        lines.append(f"next: hmar sample --checkpoint {outcome.checkpoint}")
        if recipe.objective.kind == "next-scale" and getattr(recipe.model, "pattern", "") == "diagonal":
            lines.append(f"  or: hmar finetune-masked {outcome.checkpoint} --data CACHE")
    return lines


def summary(row: dict[str, Any]) -> str:
    """The numbers that matter in the last row of metrics."""
    names = ("loss", "accuracy", "psnr", "images_per_second")
    return ", ".join(f"{name.replace('_', ' ')} {row[name]:.4g}" for name in names if name in row)

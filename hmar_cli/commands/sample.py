"""`hmar sample`: draw images from a checkpoint."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.checkpoints.store import Checkpoint
    from hmar_cli.models.scales import Scales, Schedule

EXAMPLES = """
Draw images of chosen classes from a checkpoint.

Image i takes label i modulo the number of labels, and its random numbers depend on the seed and i alone: batch
size, number of processes and order change nothing. A run that was interrupted goes on where it stopped.

**Examples**

- `hmar sample --checkpoint runs/hmar-tiny --count 16`
- `hmar sample --checkpoint runs/hmar-cifar10-masked --labels cat,ship --count 8 --cfg 1.7 --top-k 900`
- `hmar sample --checkpoint runs/hmar-d16-masked --labels 3,7 --schedule none --seed 1`
- `hmar sample --checkpoint runs/hmar-tiny-masked --schedule 1,2,4,1,1,1 --out more-passes`
- `hmar sample --checkpoint runs/var-d16 --count 50000 --npz --launch 8`
"""


WIDEST = 16
"""Most labels that get a column each in the grid; with one label, or more than these, the grid is square."""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("sample", help=EXAMPLES)(sample)


def parse_labels(text: str, class_names: tuple[str, ...]) -> list[int]:
    """Turn "3,cat" into class indices; an empty text is every class.

    Raises:
        UserError: a label that is neither a class name nor an index in range.
    """
    if not text:
        return list(range(len(class_names)))
    labels = []
    folded = [name.casefold() for name in class_names]
    for label in (part.strip() for part in text.split(",")):
        if label.casefold() in folded:
            labels.append(folded.index(label.casefold()))
        elif label.isdecimal() and int(label) < len(class_names):
            labels.append(int(label))
        else:
            import difflib

            near = difflib.get_close_matches(label.casefold(), folded, n=3)
            known = ", ".join(class_names[folded.index(n)] for n in near) or ", ".join(class_names[:10])
            raise UserError(
                f"no class {label!r} among the {len(class_names)} of this checkpoint",
                f"use an index from 0 to {len(class_names) - 1}, or a name such as {known}",
            )
    return labels


def parse_schedule(text: str, default: "Schedule", scales: "Scales") -> "Schedule":
    """Read a refinement schedule.

    Args:
        text: "recipe" (the default), "none", "single" (one token a pass), passes per scale such as "1,2,4,1", or
            JSON with the tokens kept by each pass of each scale such as "[[1],[1,3]]".
        default: the recipe's.
        scales: what it must fit.

    Raises:
        UserError: none of these, or it doesn't fit.
    """
    from hmar_cli.models.scales import check_schedule, split_passes

    try:
        if text == "recipe":
            return check_schedule(default, scales) if default else ()
        if text == "none":
            return ()
        if text == "single":
            return tuple((1,) * n for n in scales.lengths)
        if text.startswith("["):
            return check_schedule(json.loads(text), scales)
        passes = [int(part) for part in text.split(",")]
        if len(passes) != len(scales):
            raise ValueError(f"expected passes for {len(scales)} scales, got {len(passes)}")
        return tuple(split_passes(n, p) for n, p in zip(scales.lengths, passes, strict=True))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--schedule {text}: {error}",
            f"use recipe, none, single, passes for the {len(scales)} scales such as "
            f"{','.join('1' * len(scales))}, or JSON",
        ) from error


def sample(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint or run folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    labels: Annotated[
        str, typer.Option(help="Classes by index or name, as 3,7 or cat,ship. [default: all]")
    ] = "",
    count: Annotated[int, typer.Option(min=0, help="Images in all; 0 is one a label.")] = 0,
    cfg: Annotated[
        float | None, typer.Option(min=0, help="Guidance at the last scale. [default: the recipe's]")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Candidates kept, 0 all. [default: the recipe's]")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Mass kept, 0 all. [default: the recipe's]")
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(help="Refinement: recipe, none, single, passes per scale (1,2,4,1), or JSON."),
    ] = "recipe",
    refine_cfg: Annotated[
        float | None, typer.Option(min=0, help="Guidance in refinement. [default: the recipe's]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    batch_size: Annotated[int, typer.Option(min=0, help="Images at once; 0 is the recipe's.")] = 0,
    weights: Annotated[str, typer.Option(help="model or ema. [default: ema where it exists]")] = "",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer, where the checkpoint carries none.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda. [default: a GPU where there is one]")] = "",
    precision: Annotated[str, typer.Option(help="auto (bf16 on a GPU), bf16 or fp32.")] = "auto",
    npz: Annotated[bool, typer.Option("--npz", help="Also write samples.npz for ADM's evaluator.")] = False,
    columns: Annotated[int, typer.Option(min=0, help="Columns of grid.png; 0 suits the labels.")] = 0,
    launch: Annotated[int, typer.Option(min=0, help="Share the work over this many processes.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be drawn, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Draw images; the help text is `EXAMPLES`."""
    from hmar_cli.checkpoints.store import open_checkpoint
    from hmar_cli.launch import check_device, delegate

    check_device(device)
    source = open_checkpoint(checkpoint)
    flags = {"cfg": cfg, "top_k": top_k, "top_p": top_p, "refine_cfg": refine_cfg}
    given = {name: value for name, value in flags.items() if value is not None}
    settings, passes = resolve(source, given, schedule)
    classes = parse_labels(labels, source.class_names)
    if not dry_run:
        delegate(launch, device)
    from hmar_cli.builders import load_model
    from hmar_cli.console import console
    from hmar_cli.sampling.images import Job, draw_images
    from hmar_cli.sampling.next_scale import Settings

    model, codec, _ = load_model(checkpoint, weights, tokenizer)
    job = Job(
        settings=Settings(**settings, schedule=passes),
        labels=tuple(classes),
        count=count or len(classes),
        seed=seed,
        batch_size=batch_size or source.recipe.sample.batch_size,
        precision=precision,
    )
    about: dict[str, Any] = {
        "checkpoint": str(source.folder),
        "weights": weights or source.weights[-1],
        "tokenizer_hash": source.tokenizer_hash or codec.fingerprint(),
        "class_names": [source.class_names[c] for c in classes],
        **job.describe(),
    }
    if not dry_run:
        width = columns or (len(classes) if 1 < len(classes) <= WIDEST else 0)
        summary = draw_images(model, codec, job, out, device, about, width, npz)
        if summary is None:  # not the process that reports
            return
        about |= summary
        console.print(f"{job.count} images in {out}, together in {out / 'grid.png'}")
    if as_json or dry_run:
        print(json.dumps(about, indent=2, ensure_ascii=False))


def resolve(
    checkpoint: "Checkpoint", given: dict[str, Any], schedule: str
) -> tuple[dict[str, Any], "Schedule"]:
    """Complete the flags that were given by what the checkpoint's recipe says.

    Returns:
        Guidance and filters by name, and the refinement schedule.

    Raises:
        UserError: a tokenizer's checkpoint, or a schedule that does not fit or cannot be followed.
    """
    recipe = checkpoint.recipe
    if recipe.model is None:
        raise UserError(
            f"{checkpoint.folder} holds a tokenizer, not a model", "pass the checkpoint of a model"
        )
    settings = {
        name: getattr(recipe.sample, name) for name in ("cfg", "top_k", "top_p", "refine_cfg")
    } | given
    settings["top_k"] = min(settings["top_k"], recipe.tokenizer.vocab_size)
    refines = recipe.objective.kind == "masked"
    passes = parse_schedule(schedule, recipe.sample.schedule if refines else (), recipe.scales)
    if not refines and any(len(entry) > 1 for entry in passes):
        raise UserError(
            f"{checkpoint.folder} has no masked branch, so it cannot refine",
            "use --schedule none, or run `hmar finetune-masked` first",
        )
    return settings, passes

"""`hmar sample`: draw images from a checkpoint."""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.checkpoints.store import Checkpoint
    from hmar_cli.models.scales import Scales, Schedule
    from hmar_cli.sampling.images import Conditions
    from hmar_cli.settings import ClipText, JointText, MaskedArSample, NextScaleSample

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

FAST_STEPS, SLOW_STEPS = (20, 20), (250, 100)
"""Steps of the dense and the pivot head with "ddim" or "dpm++", and with "ddpm", where the recipe has the other."""

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


NEXT_SCALE_PANEL = "VAR, HMAR"
MASKED_PANEL = "MAR, Hi-MAR"


def sample(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint or run folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    labels: Annotated[
        str, typer.Option(help="Classes by index or name, as 3,7 or cat,ship. [default: all]")
    ] = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text of an image, for text models; may be repeated.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with a prompt on every line.")] = None,
    text_weights: Annotated[
        Path | None,
        typer.Option(help="File of CLIP's weights, where the recipe's tag or file is not at hand."),
    ] = None,
    count: Annotated[int, typer.Option(min=0, help="Images in all; 0 is one a label or prompt.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    cfg: Annotated[
        float | None,
        typer.Option(
            min=0, help="Guidance. VAR, HMAR: at the last scale, 0 is none. MAR, Hi-MAR: 1 is none."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, rich_help_panel=NEXT_SCALE_PANEL, help="Candidates kept, 0 all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, rich_help_panel=NEXT_SCALE_PANEL, help="Mass kept, 0 all.")
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            rich_help_panel=NEXT_SCALE_PANEL,
            help="Refinement: recipe, none, single, passes per scale (1,2,4,1), or JSON.",
        ),
    ] = "recipe",
    refine_cfg: Annotated[
        float | None, typer.Option(min=0, rich_help_panel=NEXT_SCALE_PANEL, help="Guidance in refinement.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=MASKED_PANEL, help="Steps of phase 2, or of MAR.")
    ] = None,
    pivot_steps: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=MASKED_PANEL, help="Steps of phase 1.")
    ] = None,
    pivot_cfg: Annotated[
        float | None,
        typer.Option(min=0, rich_help_panel=MASKED_PANEL, help="Guidance of phase 1; 1 is none."),
    ] = None,
    cfg_schedule: Annotated[
        Literal["linear", "constant"] | None,
        typer.Option(rich_help_panel=MASKED_PANEL, help="How guidance grows with the share of known tokens."),
    ] = None,
    pivot_cfg_schedule: Annotated[
        Literal["linear", "constant"] | None,
        typer.Option(rich_help_panel=MASKED_PANEL, help="The same in phase 1."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, rich_help_panel=MASKED_PANEL, help="Factor of ddpm's noise.")
    ] = None,
    head_sampler: Annotated[
        Literal["ddpm", "ddim", "dpm++"] | None,
        typer.Option(rich_help_panel=MASKED_PANEL, help="Diffusion sampler of the heads."),
    ] = None,
    head_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            rich_help_panel=MASKED_PANEL,
            help="Its steps. [default: the recipe's; 20 where that has ddpm]",
        ),
    ] = None,
    pivot_head_steps: Annotated[
        int | None, typer.Option(min=1, max=1000, rich_help_panel=MASKED_PANEL, help="The same in phase 1.")
    ] = None,
    pivots: Annotated[
        bool,
        typer.Option(
            "--pivots", rich_help_panel=MASKED_PANEL, help="Also write Hi-MAR's low-resolution images."
        ),
    ] = False,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            rich_help_panel=MASKED_PANEL,
            help="Compile the heads (GPU): pays from a few hundred images on.",
        ),
    ] = False,
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
    flags = {
        "cfg": cfg,
        "top_k": top_k,
        "top_p": top_p,
        "refine_cfg": refine_cfg,
        "schedule": None if schedule == "recipe" else schedule,
        "steps": steps,
        "pivot_steps": pivot_steps,
        "pivot_cfg": pivot_cfg,
        "cfg_schedule": cfg_schedule,
        "pivot_cfg_schedule": pivot_cfg_schedule,
        "temperature": temperature,
        "head_sampler": head_sampler,
        "head_steps": head_steps,
        "pivot_head_steps": pivot_head_steps,
    }
    resolved = resolve(source, {name: value for name, value in flags.items() if value is not None})
    check_switches(source, pivots, compile)
    prompts = read_prompts(prompt or [], prompt_file)
    check_condition(source, labels, prompts)
    text = text_settings(source, text_weights)
    classes = [] if prompts else parse_labels(labels, source.class_names)
    if not dry_run:
        delegate(launch, device)
    from hmar_cli.builders import load_model
    from hmar_cli.console import console
    from hmar_cli.models.masked import MaskedTransformer
    from hmar_cli.sampling.images import Job, Keep, draw_images
    from hmar_cli.sampling.masked import compile_heads

    model, codec, _ = load_model(checkpoint, weights, tokenizer)
    job = Job(
        settings=resolved,
        conditions=conditions_for(text, classes, prompts),
        count=count or len(prompts) or len(classes),
        seed=seed,
        batch_size=batch_size or source.recipe.sample.batch_size,
        precision=precision,
    )
    about: dict[str, Any] = {
        "checkpoint": str(source.folder),
        "weights": weights or source.weights[-1],
        "tokenizer_hash": source.tokenizer_hash or codec.fingerprint(),
        **({} if prompts else {"class_names": [source.class_names[c] for c in classes]}),
        **job.describe(),
    }
    if not dry_run:
        width = columns or (len(classes) if 1 < len(classes) <= WIDEST else 0)
        keep = Keep(columns=width, npz=npz, pivots=pivots)
        if compile:
            assert isinstance(model, MaskedTransformer)
            compile_heads(model)
        summary = draw_images(model, codec, job, out, device, about, keep)
        if summary is None:  # not the process that reports
            return
        about |= summary
        console.print(f"{job.count} images in {out}, together in {out / 'grid.png'}")
    if as_json or dry_run:
        print(json.dumps(about, indent=2, ensure_ascii=False))


def check_switches(checkpoint: "Checkpoint", pivots: bool, compile: bool) -> None:
    """Refuse switches that a model has no use for.

    Raises:
        UserError: pivots of a model without, or compiled heads of one that has none.
    """
    if pivots and getattr(checkpoint.recipe.model, "pivots", "none") == "none":
        raise UserError(f"{checkpoint.folder} has no pivots to write", "leave out --pivots")
    if compile and checkpoint.recipe.sample.kind != "masked-ar":
        raise UserError("--compile is for the heads of MAR and Hi-MAR", "leave it out")


def conditions_for(
    text: "ClipText | JointText | None", classes: list[int], prompts: list[str]
) -> "Conditions":
    """What the images are of: prompts for a model that reads them, else classes."""
    from hmar_cli.data.captions import caption_encoder
    from hmar_cli.sampling.images import Labels, Prompts

    if text is None:
        return Labels(tuple(classes))
    # an encoder for the device of this process, made once
    return Prompts(tuple(prompts), functools.cache(functools.partial(caption_encoder, text)))


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """Collect the prompts of the flags and of the file, which has one a line.

    Raises:
        UserError: a file that cannot be read, or holds none.
    """
    if file is None:
        return prompts
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {file}: {error}", "give a text file with a prompt on every line"
        ) from error
    found = [line for line in lines if line]
    if not found:
        raise UserError(f"{file} holds no prompt", "write one on every line")
    return [*prompts, *found]


def text_settings(checkpoint: "Checkpoint", weights: Path | None) -> "ClipText | JointText | None":
    """What reads the prompts, a frozen tower from the file that was given.

    Raises:
        UserError: a file for a model that has no such tower.
    """
    from dataclasses import replace

    from hmar_cli.settings import ClipText

    text = checkpoint.recipe.text
    if weights is None:
        return text
    if not isinstance(text, ClipText):
        raise UserError(f"{checkpoint.folder} reads no text through CLIP", "leave out --text-weights")
    return replace(text, weights=str(weights))


def check_condition(checkpoint: "Checkpoint", labels: str, prompts: list[str]) -> None:
    """See that a text model gets prompts, and another one labels.

    Raises:
        UserError: the wrong ones, or none for a text model.
    """
    if checkpoint.recipe.text is None and prompts:
        raise UserError(
            f"{checkpoint.folder} draws classes and knows no text", "use --labels with names or indices"
        )
    if checkpoint.recipe.text is not None and (labels or not prompts):
        raise UserError(
            f"{checkpoint.folder} draws what a text says", 'use --prompt "…" or --prompt-file FILE'
        )


def resolve(checkpoint: "Checkpoint", given: dict[str, Any]) -> "NextScaleSample | MaskedArSample":
    """Complete the flags that were given by what the checkpoint's recipe says.

    Raises:
        UserError: a tokenizer's checkpoint, a flag of the other family, or values that cannot be followed.
    """
    from dataclasses import fields, replace

    from hmar_cli.settings import NextScaleSample, impossible_combinations

    recipe = checkpoint.recipe
    if recipe.model is None or recipe.model.kind == "classifier":
        what = "classifier" if recipe.model else "tokenizer"
        raise UserError(f"{checkpoint.folder} holds a {what}, not a model", "pass the checkpoint of a model")
    settings = recipe.sample
    known = {each.name for each in fields(settings)}
    if foreign := [f"--{name.replace('_', '-')}" for name in given if name not in known]:
        family = "VAR or HMAR" if isinstance(settings, NextScaleSample) else "MAR or Hi-MAR"
        raise UserError(
            f"{checkpoint.folder} is a {family}, which has no {', '.join(foreign)}",
            "`hmar sample --help` lists the flags of each family",
        )
    if isinstance(settings, NextScaleSample):
        return _resolve_next_scale(checkpoint, settings, given)
    phase1 = [f"--{name.replace('_', '-')}" for name in given if name.startswith("pivot_")]
    if phase1 and getattr(recipe.model, "pivots", "none") == "none":
        raise UserError(
            f"{checkpoint.folder} is a MAR, which has no pivots for {', '.join(phase1)}", "leave them out"
        )
    sampler = given.get("head_sampler", settings.head_sampler)
    if (sampler == "ddpm") != (settings.head_sampler == "ddpm"):  # the recipe's steps are not for this one
        steps = SLOW_STEPS if sampler == "ddpm" else FAST_STEPS
        given = {"head_steps": steps[0], "pivot_head_steps": steps[1], "temperature": 1.0, **given}
    chosen = replace(settings, **given)
    if problems := impossible_combinations(replace(recipe, sample=chosen)):
        raise UserError("these flags cannot be followed", "see `hmar sample --help`", problems)
    return chosen


def _resolve_next_scale(
    checkpoint: "Checkpoint", settings: "NextScaleSample", given: dict[str, Any]
) -> "NextScaleSample":
    """The same for VAR and HMAR, whose schedule comes in several spellings."""
    from dataclasses import replace

    from hmar_cli.settings import Msvq

    recipe = checkpoint.recipe
    assert isinstance(recipe.tokenizer, Msvq)
    refines = recipe.objective.kind == "masked"
    passes = parse_schedule(
        given.get("schedule", "recipe"), settings.schedule if refines else (), recipe.scales
    )
    if not refines and any(len(entry) > 1 for entry in passes):
        raise UserError(
            f"{checkpoint.folder} has no masked branch, so it cannot refine",
            "use --schedule none, or run `hmar finetune-masked` first",
        )
    chosen = replace(settings, **given | {"schedule": passes})
    return replace(chosen, top_k=min(chosen.top_k, recipe.tokenizer.vocab_size))

"""Flags of every command that draws with a model, and what they come to for a checkpoint."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.builders import Model
    from hmar_cli.builders import Tokenizer as Codec
    from hmar_cli.checkpoints import store
    from hmar_cli.models.scales import Scales, Schedule
    from hmar_cli.sampling.images import Conditions, Job
    from hmar_cli.settings import ClipText, JointText, MaskedArSample, NextScaleSample, Recipe

NEXT_SCALE_PANEL = "VAR, HMAR"
MASKED_PANEL = "MAR, Hi-MAR"

SHOWN = 8
"""Classes or prompts that a plan names."""

FAST_STEPS, SLOW_STEPS = (20, 20), (250, 100)
"""Steps of the dense and the pivot head with "ddim" or "dpm++", and with "ddpm", where the recipe has the other."""

Checkpoint = Annotated[Path, typer.Option(help="Checkpoint or run folder.")]
Prompt = Annotated[list[str] | None, typer.Option(help="Text of an image, for text models; may be repeated.")]
TextWeights = Annotated[
    Path | None,
    typer.Option(help="File of CLIP's weights, where the recipe's tag or file is not at hand."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of all random numbers.")]
BatchSize = Annotated[int, typer.Option(min=0, help="Images at once; 0 is the recipe's.")]
Weights = Annotated[str, typer.Option(help="model or ema. [default: ema where it exists]")]
Tokenizer = Annotated[Path | None, typer.Option(help="Tokenizer, where the checkpoint carries none.")]
Device = Annotated[str, typer.Option(help="cpu or cuda. [default: a GPU where there is one]")]
Precision = Annotated[Literal["auto", "bf16", "fp32"], typer.Option(help="auto is bf16 on a GPU, else fp32.")]
ExtractorWeights = Annotated[
    Path | None, typer.Option(help="File of the extractor's weights, where they cannot be downloaded.")
]
Launch = Annotated[int, typer.Option(min=0, help="Share the work over this many processes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """The setting that samplers of all families have."""

    cfg: Annotated[
        float | None,
        typer.Option(
            min=0, help="Guidance. VAR, HMAR: at the last scale, 0 is none. MAR, Hi-MAR: 1 is none."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class NextScaleSampler(Guidance):
    """How VAR and HMAR draw; what is not given is the recipe's."""

    top_k: Annotated[
        int | None, typer.Option(min=0, rich_help_panel=NEXT_SCALE_PANEL, help="Candidates kept, 0 all.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, rich_help_panel=NEXT_SCALE_PANEL, help="Mass kept, 0 all.")
    ] = None
    schedule: Annotated[
        str,
        typer.Option(
            rich_help_panel=NEXT_SCALE_PANEL,
            help="Refinement: recipe, none, single, passes per scale (1,2,4,1), or JSON.",
        ),
    ] = "recipe"
    refine_cfg: Annotated[
        float | None, typer.Option(min=0, rich_help_panel=NEXT_SCALE_PANEL, help="Guidance in refinement.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class MaskedSampler(Guidance):
    """How MAR and Hi-MAR draw; what is not given is the recipe's."""

    steps: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=MASKED_PANEL, help="Steps of phase 2, or of MAR.")
    ] = None
    pivot_steps: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=MASKED_PANEL, help="Steps of phase 1.")
    ] = None
    pivot_cfg: Annotated[
        float | None,
        typer.Option(min=0, rich_help_panel=MASKED_PANEL, help="Guidance of phase 1; 1 is none."),
    ] = None
    cfg_schedule: Annotated[
        Literal["linear", "constant"] | None,
        typer.Option(rich_help_panel=MASKED_PANEL, help="How guidance grows with the share of known tokens."),
    ] = None
    pivot_cfg_schedule: Annotated[
        Literal["linear", "constant"] | None,
        typer.Option(rich_help_panel=MASKED_PANEL, help="The same in phase 1."),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(min=0, rich_help_panel=MASKED_PANEL, help="Factor of ddpm's noise.")
    ] = None
    head_sampler: Annotated[
        Literal["ddpm", "ddim", "dpm++"] | None,
        typer.Option(rich_help_panel=MASKED_PANEL, help="Diffusion sampler of the heads."),
    ] = None
    head_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            rich_help_panel=MASKED_PANEL,
            help="Its steps. [default: the recipe's; 20 where that has ddpm]",
        ),
    ] = None
    pivot_head_steps: Annotated[
        int | None, typer.Option(min=1, max=1000, rich_help_panel=MASKED_PANEL, help="The same in phase 1.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Sampler(MaskedSampler, NextScaleSampler):
    """How models of any family draw."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What images are of."""

    labels: Annotated[
        str, typer.Option(help="Classes by index or name, as 3,7 or cat,ship. [default: all]")
    ] = ""
    prompt: Prompt = None
    prompt_file: Annotated[Path | None, typer.Option(help="File with a prompt on every line.")] = None

    def prompts(self) -> list[str]:
        """The prompts of the flags and of the file.

        Raises:
            UserError: a file that cannot be read, or holds none.
        """
        from hmar_cli.data.captions import read_prompts

        return [*(self.prompt or ()), *(read_prompts(self.prompt_file) if self.prompt_file else ())]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Which weights draw, how and by which random numbers."""

    seed: Seed = 0
    weights: Weights = ""
    tokenizer: Tokenizer = None
    text_weights: TextWeights = None
    precision: Precision = "auto"


@dataclass(frozen=True, kw_only=True)
class Drawing(Loading):
    """The same for many images."""

    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the heads of MAR and Hi-MAR, worth it for some hundred images or more; let batches of VAR "
            "and HMAR be CUDA graphs. [default: VAR and HMAR, on a GPU]",
        ),
    ] = None


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
        text: "recipe" (the default), "none", "single" (one token a pass, but for the first scale), passes per scale
            such as "1,2,4,1", or JSON with the tokens kept by each pass of each scale such as "[[1],[1,3]]".
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
            return (scales.lengths[:1], *((1,) * n for n in scales.lengths[1:]))
        if text.startswith("["):
            return check_schedule(json.loads(text), scales)
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise ValueError("no such schedule")
        passes = [int(part) for part in parts]
        if len(passes) != len(scales):
            raise ValueError(f"expected passes for {len(scales)} scales, got {len(passes)}")
        shares = [split_passes(n, p) for n, p in zip(scales.lengths, passes, strict=True)]
        return check_schedule(shares, scales)
    except (ValueError, TypeError) as error:
        broken = isinstance(error, json.JSONDecodeError)
        raise UserError(
            f"--schedule {text}: {'not JSON' if broken else error}",
            f"use recipe, none, single, passes for the {len(scales)} scales such as "
            f"{','.join('1' * len(scales))}, or JSON",
        ) from error


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


def text_settings(checkpoint: "store.Checkpoint", weights: Path | None) -> "ClipText | JointText | None":
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


def check_condition(checkpoint: "store.Checkpoint", labels: str, prompts: list[str]) -> None:
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


def resolve(checkpoint: "store.Checkpoint", given: dict[str, Any]) -> "NextScaleSample | MaskedArSample":
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
            "`--help` lists the flags of each family",
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
        raise _of_flags(problems, chosen, recipe)
    return chosen


def _of_flags(problems: list[str], chosen: "MaskedArSample", recipe: "Recipe") -> UserError:
    """What is wrong with a recipe whose settings of the sampler are those of the flags, in terms of the flags."""
    import math

    lines, hints = [], []
    for problem in problems:
        setting, _, what = problem.removeprefix("sample.").partition(": ")
        flag = f"--{setting.replace('_', '-')}"
        lines.append(f"{flag} {getattr(chosen, setting)}: {what}")
        if setting == "temperature":
            hints.append(f"leave out {flag}, or add --head-sampler ddpm")
        else:
            grid = recipe.grid if setting == "steps" else recipe.pivot_grid
            hints.append(f"at most {flag} {math.prod(grid or ())}")
    if len(lines) == 1:
        return UserError(lines[0], hints[0])
    return UserError("these flags cannot be followed", "; ".join(hints), lines)


def _resolve_next_scale(
    checkpoint: "store.Checkpoint", settings: "NextScaleSample", given: dict[str, Any]
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


@dataclass(frozen=True, kw_only=True)
class Order:
    """Images that are asked of a checkpoint: checked, and none of its weights read.

    Attributes:
        checkpoint: what draws them.
        loading: with which weights, and how.
        settings: of the sampler.
        text: what reads the prompts of a text model.
        classes: image i is of class i, modulo their number.
        prompts: the same for a text model.
        count: images in all.
        batch_size: images at once.
    """

    checkpoint: "store.Checkpoint"
    loading: Drawing
    settings: "NextScaleSample | MaskedArSample"
    text: "ClipText | JointText | None"
    classes: Sequence[int]
    prompts: Sequence[str]
    count: int
    batch_size: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes that are drawn; none where prompts are."""
        return tuple(self.checkpoint.class_names[each] for each in self.classes)

    def outline(self) -> dict[str, str]:
        """What would be drawn, in a line each, for `print_plan`.

        Raises:
            UserError: the checkpoint has no such weights.
        """
        from dataclasses import asdict

        source, loading = self.checkpoint, self.loading
        settings = {key: value for key, value in asdict(self.settings).items() if key != "batch_size"}
        if "schedule" in settings:
            passes = ",".join(str(len(entry)) for entry in settings["schedule"])
            settings["schedule"] = passes or "none"
        contents, what = (self.prompts, "prompts") if self.prompts else (self.class_names, "classes")
        some = "; ".join(contents[:SHOWN]) + "; …" * (len(contents) > SHOWN)
        weights = source.weights_file(loading.weights).stem
        return {
            "images": f"{self.count} by seed {loading.seed}, {self.batch_size} at once, in {loading.precision}",
            what: f"{len(contents)}: {some}",
            "weights": f"{weights} of {source.folder}, step {source.step} of {source.recipe.name}",
            "sampler": ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items()),
        }

    def job(self) -> "Job":
        """The work for a sampler."""
        from hmar_cli.sampling.images import Job

        return Job(
            settings=self.settings,
            conditions=conditions_for(self.text, list(self.classes), list(self.prompts)),
            count=self.count,
            seed=self.loading.seed,
            batch_size=self.batch_size,
            precision=self.loading.precision,
            compile=self.loading.compile,
        )

    def load(self) -> "tuple[Model, Codec, dict[str, Any]]":
        """Model and tokenizer on the CPU, and what is recorded of them beside the job's own settings.

        Raises:
            UserError: weights or tokenizer are not there, or do not fit.
        """
        from hmar_cli.builders import load_model

        which = self.loading.weights
        model, codec, checkpoint = load_model(self.checkpoint.folder, which, self.loading.tokenizer)
        about = {
            **checkpoint.describe(which),
            "tokenizer_hash": checkpoint.tokenizer_hash or codec.fingerprint(),
            **({} if self.prompts else {"class_names": list(self.class_names)}),
        }
        return model, codec, about


def print_plan(lines: Mapping[str, str]) -> None:
    """Print what a command would do: a name and a text in each line."""
    for name, text in lines.items():
        print(f"{name:9} {text}")


def place_order(
    checkpoint: Path,
    given: dict[str, Any],
    loading: Drawing,
    *,
    labels: str,
    prompts: list[str],
    count: int,
    batch_size: int,
) -> Order:
    """Check what a command's flags ask of a checkpoint, and complete them by its recipe.

    Args:
        checkpoint: a checkpoint or run folder.
        given: settings of the sampler that are not the recipe's.
        loading: with which weights, and how.
        labels: classes by name or index, such as "3,cat"; empty for all.
        prompts: texts, for a model that reads them.
        count: images in all; 0 is one a class or prompt.
        batch_size: images at once; 0 is the recipe's.

    Raises:
        UserError: no such checkpoint, or flags that it cannot follow.
    """
    from hmar_cli.checkpoints.store import open_checkpoint

    source = open_checkpoint(checkpoint)
    settings = resolve(source, given)
    check_condition(source, labels, prompts)
    classes = [] if prompts else parse_labels(labels, source.class_names)
    return Order(
        checkpoint=source,
        loading=loading,
        settings=settings,
        text=text_settings(source, loading.text_weights),
        classes=classes,
        prompts=prompts,
        count=count or len(prompts) or len(classes),
        batch_size=batch_size or source.recipe.sample.batch_size,
    )

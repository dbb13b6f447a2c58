"""`hmar analyze`, the analyses of next-scale models: VAR, HMAR and their tokenizers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.commands import drawing, sweeping
from hmar_cli.commands.flags import choose, given, short_names, with_flags
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hmar_cli.analysis.held_out import HeldOut, Subject
    from hmar_cli.analysis.reconstruction import Version
    from hmar_cli.analysis.results import Row
    from hmar_cli.settings import NextScaleSample, Recipe

LENGTHS = """
Sequence length against resolution and against sampling steps (HMAR supplement B.1, Figs 7 and 8).

A next-scale model sees all scales of an image, so its sequence is longer than that of next-token prediction. A
sampling step more is a scale more for VAR, up to one of each side; HMAR's steps redraw tokens that are there.

**Examples**

- `hmar analyze lengths`
- `hmar analyze lengths --resolutions 256,512 --json`
"""

SCALES = """
Held-out loss and accuracy of every scale, and how hard each is to learn (HMAR supplement, Figs 12, 16 and 22).

Every scale is predicted from the true coarser ones. A model with a masked branch is judged twice: at next-scale
prediction, and at masked prediction of a share of each scale's tokens. Accuracies of a few per cent are normal for
photographs: most tokens are fine detail.

The third panel takes the least loss of each scale over the models given (give several checkpoints of one run:
`runs/hmar/step-*`) and fits a log-normal curve to it.

**Examples**

- `hmar analyze scales runs/var runs/hmar-masked --data "builtin:shapes?seed=1" --count 2000`
- `hmar analyze scales runs/unweighted runs/lognormal --data caches/imagenet-val --out analysis/weighting`
- `hmar analyze scales runs/hmar-masked --data cifar10-test.parquet --mask-share 0.5 --json`
"""

ATTENTION = """
Where trained models look: attention by scale, by token, by distance and by head (HMAR supplement, Figs 9 and 10).

Attention is that of next-scale prediction, averaged over images: held-out ones, or without `--data` the models' own
samples. Everything is compared with even attention to all keys that a token sees. VAR sees its own and all
earlier scales, HMAR its own alone: what the mask leaves out is white.

**Examples**

- `hmar analyze attention runs/var runs/hmar --data "builtin:shapes?seed=1"`
- `hmar analyze attention checkpoints/var-d16 --count 16 --batch-size 4 --out analysis/var-d16`
"""

TEACHER_FORCING = """
How errors pile up over scales (HMAR supplement D.1, Fig. 17): images that start from true tokens.

The first k scales of held-out images are given, for every k from none to all, and the model draws the rest as
`hmar sample` would. Few known scales give another picture of the class, all of them what the tokenizer makes of the
image. The grid has a row for each k. PSNR is against the images; with `--extractor` their Fréchet distance from the
drawn ones is measured, too, and of a classifier the share whose class it finds.

**Examples**

- `hmar analyze teacher-forcing runs/var --data "builtin:shapes?seed=1"`
- `hmar analyze teacher-forcing runs/var runs/hmar --data cifar10-test.parquet --extractor runs/classifier-cifar10`
- `hmar analyze teacher-forcing checkpoints/var-d16 --data imagenet-val/ --count 64 --extractor inception`
"""

HALF_MASKED = """
Reconstruction from half-masked scales (HMAR supplement D.2, Fig. 18).

Half of the tokens of every scale of held-out images are masked; a model with a masked branch chooses them given the
others. Beside it stand next-scale prediction, which chooses every token given the true coarser scales, the tokenizer
alone, and chance: the masked tokens of another image. The most probable tokens are taken, nothing is drawn.

**Examples**

- `hmar analyze half-masked runs/var runs/hmar-masked --data "builtin:shapes?seed=1"`
- `hmar analyze half-masked runs/hmar-masked --data photos/ --share 0.75 --extractor runs/classifier`
"""

CODEBOOK = """
How a tokenizer uses its codes at every scale (HMAR supplement E.2, Fig. 23): usage, perplexity, frequency by rank.

PATH is a multi-scale tokenizer, a model or cache that carries one; of a cache the images are its own. A scale of few
tokens cannot show many codes: beside the codes in use stands how many that would be if all were equally likely.

**Examples**

- `hmar analyze codebook caches/photos`
- `hmar analyze codebook runs/tokenizer --data cifar10-test.parquet --count 0`
- `hmar analyze codebook checkpoints/var-d16 --data imagenet-val/ --count 5000 --json`
"""

WEIGHTINGS = """
The six weightings of the next-scale loss over scales (HMAR supplement C.2, Fig. 13).

**Examples**

- `hmar analyze weightings`
- `hmar analyze weightings --sides 1,2,3,4,6,8 --out analysis/weightings-tiny`
"""

WEIGHTING_QUALITY = """
Train a model with each weighting of the loss, and measure their images (HMAR supplement C.2, Table 4).

Every run has the recipe's settings but for `objective.weighting`; runs lie in `--runs`, a finished one is kept and
one that was stopped goes on. The paper samples with cfg=1.5, top_k=900 and top_p=0.96, at 310M parameters. Loss and
accuracy per scale (Figs 14 to 16) come from `hmar analyze scales runs/weightings/* --data SOURCE`.

**Examples**

- `hmar analyze weighting-quality --data caches/shapes --reference "builtin:shapes?seed=1" --extractor runs/judge`
- `hmar analyze weighting-quality --recipe hmar-cifar10 --data caches/cifar10 --train-seeds 0,1 --only none,lognormal
  --set cfg=1.5 --reference cifar10-test.parquet --extractor runs/classifier-cifar10`
"""

Checkpoints = Annotated[
    list[Path], typer.Argument(help="Checkpoints or run folders of VAR and HMAR.", show_default=False)
]
Data = Annotated[
    str, typer.Option(help="Held-out images: a cache, or a source of images.", show_default=False)
]
Count = Annotated[int, typer.Option(min=0, help="Images, evenly spaced over the data; 0 is all.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the files. [default: analysis/ and this name]")]
Pictures = Annotated[str, typer.Option(help="Source of held-out images.", show_default=False)]
Sides = Annotated[str, typer.Option(help="A scale list, such as 1,2,3x4. [default: that of 256 pixels]")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once.")]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How models are loaded and where the files go; each field is a flag."""

    seed: drawing.Seed = 0
    batch_size: BatchSize = 32
    weights: drawing.Weights = ""
    tokenizer: drawing.Tokenizer = None
    device: drawing.Device = ""
    out: Out = None
    as_json: drawing.AsJson = False


@dataclass(frozen=True, kw_only=True)
class Looking:
    """How pictures are compared and shown; each field is a flag."""

    extractor: Annotated[
        str,
        typer.Option(help="Also measure distances: a classifier's run, inception, open_clip:TOWER/TAG, …."),
    ] = ""
    extractor_weights: drawing.ExtractorWeights = None
    shown: Annotated[int, typer.Option(min=1, max=64, help="Images in a row of the grid.")] = 8


def register(app: typer.Typer) -> None:
    """Add the commands to `hmar analyze`."""
    app.command("lengths", help=LENGTHS)(lengths)
    app.command("scales", help=SCALES)(scales)
    app.command("attention", help=ATTENTION)(attention)
    app.command("teacher-forcing", help=TEACHER_FORCING)(teacher_forcing)
    app.command("half-masked", help=HALF_MASKED)(half_masked)
    app.command("codebook", help=CODEBOOK)(codebook)
    app.command("weightings", help=WEIGHTINGS)(weightings)
    app.command("weighting-quality", help=WEIGHTING_QUALITY)(weighting_quality)


def load_subjects(analysis: str, checkpoints: Sequence[Path], flags: Flags) -> "list[Subject]":
    """Load models for an analysis, which share a tokenizer, under names that differ.

    Raises:
        UserError: one cannot be had, is of another family, or has another tokenizer; or the analysis cannot be
            written.
    """
    from hmar_cli.launch import choose_device

    place = choose_device(flags.device)
    from hmar_cli.analysis.held_out import load_subject, require_same_tokenizer
    from hmar_cli.analysis.results import analysis_folder

    analysis_folder(flags.out, analysis)
    subjects = [
        load_subject(path, name, place, flags.weights, flags.tokenizer)
        for path, name in zip(checkpoints, short_names(checkpoints), strict=True)
    ]
    require_same_tokenizer(subjects)
    return subjects


def finish(
    name: str,
    flags: Flags,
    rows: "Sequence[Row]",
    settings: Mapping[str, Any],
    figure: "Figure | None",
    **more: Any,
) -> None:
    """Write an analysis and print it; `more` is given to `publish_analysis`."""
    from hmar_cli.analysis.results import publish_analysis

    publish_analysis(flags.out, name, rows, settings, figure, as_json=flags.as_json, **more)


# Sequences and scales


def lengths(
    resolutions: Annotated[str, typer.Option(help="Pixels at which steps are added: 256,512,1024.")] = "256",
    out: Out = None,
    as_json: drawing.AsJson = False,
) -> None:
    """Draw Figs 7 and 8; the help text is `LENGTHS`."""
    from hmar_cli.benchmarks.cases import RESOLUTIONS, lengths_by_resolution, lengths_by_steps
    from hmar_cli.benchmarks.charts import length_chart

    asked = choose("--resolutions", resolutions, list(map(str, RESOLUTIONS)), "scales for")
    by_resolution = lengths_by_resolution()
    by_steps = {int(pixels): lengths_by_steps(RESOLUTIONS[int(pixels)]) for pixels in asked}
    rows: list[Row] = [{"figure": "7", **row} for row in by_resolution]
    rows += [{"figure": "8", "pixels": pixels, **row} for pixels, own in by_steps.items() for row in own]
    target = (out or Path("analysis") / "lengths") / "lengths.png"
    length_chart(by_resolution, by_steps, target)
    settings = {"sides": {str(pixels): list(sides) for pixels, sides in RESOLUTIONS.items()}}
    finish("lengths", Flags(out=out, as_json=as_json), rows, settings, None, drawn=[target])


@with_flags
def scales(
    checkpoints: Checkpoints,
    data: Data,
    flags: Flags,
    count: Count = 1000,
    mask_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Of masked tokens. [default: evenly over 0 to 1, as in training]"),
    ] = None,
) -> None:
    """Draw Figs 12, 16 and 22; the help text is `SCALES`."""
    subjects = load_subjects("scales", checkpoints, flags)
    from hmar_cli.analysis.held_out import read_held_out
    from hmar_cli.analysis.scales import measure_scales, scale_figure, summarize, tasks

    grids, together = subjects[0].model.scales, flags.batch_size
    held_out = read_held_out(data, subjects[0].codec, count=count, batch_size=together)
    rows = [
        row
        for subject in subjects
        for task in tasks(subject)
        for row in measure_scales(
            subject, held_out, task, batch_size=together, seed=flags.seed, share=mask_share
        )
    ]
    settings = {
        "models": [subject.describe() for subject in subjects],
        "held_out": held_out.about,
        "sides": grids.sides(),
        "mask_share": mask_share,
        "seed": flags.seed,
        "precision": "fp32",
    }
    summary = summarize(rows, grids)
    notes = [
        f"{each['model']}, {each['task']}: cross-entropy {each['cross_entropy']:.4g} nats, "
        f"accuracy {each['accuracy']:.2%} of all its tokens"
        for each in summary["totals"]
    ]
    finish("scales", flags, rows, settings, scale_figure(rows, grids), summary=summary, notes=notes)


@with_flags
def attention(
    checkpoints: Checkpoints,
    flags: Flags,
    data: Annotated[
        str, typer.Option(help="Cache or source of images. [default: each model's own samples]")
    ] = "",
    count: Count = 64,
) -> None:
    """Draw Figs 9 and 10; the help text is `ATTENTION`."""
    if not data and not count:
        raise UserError("--count 0: samples have no number of their own", "give --count, or --data")
    subjects, together = load_subjects("attention", checkpoints, flags), flags.batch_size
    from hmar_cli.analysis.attention import attention_figure, attention_rows, measure_attention, scale_pairs
    from hmar_cli.analysis.held_out import draw_held_out, read_held_out

    shared = read_held_out(data, subjects[0].codec, count=count, batch_size=together) if data else None
    found, images = {}, {}
    for subject in subjects:
        seen = shared or draw_held_out(subject, count=count, seed=flags.seed, batch_size=together)
        found[subject.name], images[subject.name] = measure_attention(subject, seen, together), seen.about
    rows = [row for name, patterns in found.items() for row in attention_rows(name, patterns)]
    pairs = [row for name, patterns in found.items() for row in scale_pairs(name, patterns)]
    settings = {
        "models": [subject.describe() for subject in subjects],
        "images": images,
        "sides": subjects[0].model.scales.sides(),
        "precision": "fp32",
    }
    summary, figure = {"scale_pairs": pairs}, attention_figure(found)
    finish("attention", flags, rows, settings, figure, summary=summary, shown=pairs)


# Pictures of which a part is known


@with_flags
def teacher_forcing(
    checkpoints: Checkpoints,
    data: Pictures,
    flags: Flags,
    sampler: drawing.NextScaleSampler,
    looking: Looking,
    count: Count = 200,
    precision: drawing.Precision = "auto",
) -> None:
    """Draw Fig. 17; the help text is `TEACHER_FORCING`."""
    subjects = load_subjects("teacher-forcing", checkpoints, flags)
    samplers = [next_scale_settings(subject, given(sampler)) for subject in subjects]
    from hmar_cli.analysis import reconstruction

    held_out = read_pictures(subjects, data, flags, count)
    versions = [
        version
        for subject, settings in zip(subjects, samplers, strict=True)
        for version in reconstruction.known_scales(
            subject, held_out, settings, seed=flags.seed, precision=precision
        )
    ]
    judge, rows, tiles = compare(subjects, held_out, versions, flags, looking)
    about = {
        "models": [
            {**subject.describe(), "sample": asdict(settings)}
            for subject, settings in zip(subjects, samplers, strict=True)
        ],
        "held_out": held_out.about,
        "extractor": judge,
        "seed": flags.seed,
        "precision": precision,
    }
    figure = reconstruction.known_scales_figure(rows, subjects[0].model.scales)
    finish("teacher-forcing", flags, rows, about, figure, tiles=tiles)


@with_flags
def half_masked(
    checkpoints: Checkpoints,
    data: Pictures,
    flags: Flags,
    looking: Looking,
    count: Count = 200,
    share: Annotated[float, typer.Option(min=0, max=1, help="Of masked tokens of every scale.")] = 0.5,
) -> None:
    """Draw Fig. 18; the help text is `HALF_MASKED`."""
    subjects = load_subjects("half-masked", checkpoints, flags)
    if all(subject.model.masked is None for subject in subjects):
        raise UserError(
            f"{checkpoints[0]} has no masked branch", "give a model that `hmar finetune-masked` made"
        )
    from hmar_cli.analysis import reconstruction

    held_out = read_pictures(subjects, data, flags, count)
    versions = reconstruction.half_masked(subjects, held_out, share=share, seed=flags.seed)
    judge, rows, tiles = compare(subjects, held_out, versions, flags, looking)
    about = {
        "models": [subject.describe() for subject in subjects],
        "held_out": held_out.about,
        "extractor": judge,
        "share": share,
        "seed": flags.seed,
        "precision": "fp32",
    }
    finish("half-masked", flags, rows, about, reconstruction.half_masked_figure(rows), tiles=tiles)


def next_scale_settings(subject: "Subject", asked: dict[str, Any]) -> "NextScaleSample":
    """How a VAR or HMAR samples: by its recipe, but for the flags that were given."""
    from hmar_cli.settings import NextScaleSample

    settings = drawing.resolve(subject.checkpoint, asked)
    assert isinstance(settings, NextScaleSample)
    return settings


def read_pictures(subjects: "Sequence[Subject]", data: str, flags: Flags, count: int) -> "HeldOut":
    """Held-out images as tokens, with their pictures."""
    from hmar_cli.analysis.held_out import read_held_out

    return read_held_out(data, subjects[0].codec, count=count, batch_size=flags.batch_size, pictures=True)


def compare(
    subjects: "Sequence[Subject]",
    held_out: "HeldOut",
    versions: "Sequence[Version]",
    flags: Flags,
    looking: Looking,
) -> "tuple[dict[str, Any] | None, list[Row], dict[str, list[Any]]]":
    """Judge versions of images: the extractor for the record, their rows, and the images to show."""
    from hmar_cli.analysis.reconstruction import Bench, judge_all
    from hmar_cli.evaluation.extractors import open_extractor

    first = subjects[0]
    extractor = None
    if looking.extractor:
        extractor = open_extractor(looking.extractor, first.device, looking.extractor_weights)
    bench = Bench(held_out, first.codec, extractor, batch_size=flags.batch_size, shown=looking.shown)
    rows, tiles = judge_all(bench, versions)
    return extractor.describe() if extractor else None, rows, tiles


# Tokenizers and training


def codebook(
    path: Annotated[Path, typer.Argument(help="Tokenizer, model or cache.", show_default=False)],
    data: Annotated[str, typer.Option(help="Cache or source of images. [default: PATH's own images]")] = "",
    count: Count = 5000,
    batch_size: BatchSize = 32,
    device: drawing.Device = "",
    out: Out = None,
    as_json: drawing.AsJson = False,
) -> None:
    """Draw Fig. 23; the help text is `CODEBOOK`."""
    from hmar_cli.launch import choose_device

    place = choose_device(device)
    if not data and not (path / "manifest.json").is_file():
        raise UserError("--data is missing", f"{path} is no cache, so say which images are to be encoded")
    from hmar_cli.analysis.codebook import codebook_figure, codebook_rows, rank_curves
    from hmar_cli.analysis.held_out import load_msvq, read_held_out
    from hmar_cli.analysis.results import analysis_folder
    from hmar_cli.evaluation.codes import count_codes

    analysis_folder(out, "codebook")
    codec, checkpoint = load_msvq(path)
    held_out = read_held_out(data or str(path), codec.to(place), count=count, batch_size=batch_size)
    counts = count_codes(held_out.tokens, codec.scales, codec.vocab_size)
    rows = codebook_rows(counts, codec.scales)
    settings = {
        "tokenizer": str(checkpoint.folder),
        "tokenizer_hash": codec.fingerprint(),
        "sides": codec.scales.sides(),
        "codes": codec.vocab_size,
        "images": held_out.about,
    }
    summary = {"rank_frequency": rank_curves(counts, codec.scales)}
    figure = codebook_figure(counts, rows, codec.scales)
    finish("codebook", Flags(out=out, as_json=as_json), rows, settings, figure, summary=summary)


def weightings(
    sides: Sides = "",
    out: Out = None,
    as_json: drawing.AsJson = False,
) -> None:
    """Draw Fig. 13; the help text is `WEIGHTINGS`."""
    from hmar_cli.analysis.weightings import weighting_figure, weighting_rows
    from hmar_cli.benchmarks.cases import RESOLUTIONS, parse_sides
    from hmar_cli.models.scales import Scales

    grids = parse_sides(sides) if sides else Scales.of(RESOLUTIONS[256])
    rows, settings = weighting_rows(grids), {"sides": grids.sides()}
    finish("weightings", Flags(out=out, as_json=as_json), rows, settings, weighting_figure(rows, grids))


@with_flags
def weighting_quality(
    data: Annotated[str, typer.Option(help="Cache to train on.", show_default=False)],
    flags: sweeping.Flags,
    training: sweeping.Training,
    recipe: Annotated[str, typer.Option(help="Of a next-scale model, by name or path.")] = "hmar-tiny",
    only: Annotated[str, typer.Option(help="Weightings, by commas. [default: all six]")] = "",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/weightings"),
) -> None:
    """Make Table 4; the help text is `WEIGHTING_QUALITY`."""
    from hmar_cli.analysis import studies

    study = sweeping.Study(
        name="weighting-quality",
        metrics="fid,is,precision,recall",
        draw=studies.draw_ablation,
        base="always",
        varies=False,
        row=lambda outcome: {key: value for key, value in outcome.row.items() if value not in ("", None)},
    )
    recipes = weighted(recipe, only, training.train_set or [])
    chosen = sweeping.rows_to_train(recipes, training.train_seeds, runs)
    sweeping.train_and_measure(study, chosen, data, flags)


def weighted(name: str, only: str, overrides: Sequence[str]) -> "dict[str, Recipe]":
    """A recipe with each of some weightings, by the weighting.

    Raises:
        UserError: no such recipe or weighting, or a recipe of another family.
    """
    from hmar_cli.analysis.weightings import WEIGHTINGS
    from hmar_cli.recipe import load_recipe
    from hmar_cli.settings import NextScaleObjective

    base = load_recipe(name, list(overrides))
    if not isinstance(base.objective, NextScaleObjective):
        raise UserError(
            f"recipe '{base.name}' weighs no scales", "give one of a VAR or HMAR, such as hmar-tiny"
        )
    asked = choose("--only", only, WEIGHTINGS, "weighting")
    return {each: load_recipe(name, [*overrides, f"objective.weighting={each}"]) for each in asked}

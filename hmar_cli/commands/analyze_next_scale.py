"""`hmar analyze`, the analyses of next-scale models: VAR, HMAR and their tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.commands import drawing
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    import torch

    from hmar_cli.analysis.held_out import HeldOut, Subject
    from hmar_cli.analysis.reconstruction import Bench
    from hmar_cli.settings import NextScaleSample

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

Checkpoints = Annotated[
    list[Path], typer.Argument(help="Checkpoints or run folders of VAR and HMAR.", show_default=False)
]
Data = Annotated[
    str, typer.Option(help="Held-out images: a cache, or a source of images.", show_default=False)
]
Count = Annotated[int, typer.Option(min=0, help="Images, evenly spaced over the data; 0 is all.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the files. [default: analysis/ and this name]")]
Pictures = Annotated[str, typer.Option(help="Source of held-out images.", show_default=False)]
Extractor = Annotated[
    str,
    typer.Option(help="Also measure distances: a classifier's run, inception, open_clip:TOWER/TAG, …."),
]
ExtractorWeights = Annotated[Path | None, typer.Option(help="Local file of its weights.")]
Shown = Annotated[int, typer.Option(min=1, max=64, help="Images in a row of the grid.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `hmar analyze`."""
    app.command("lengths", help=LENGTHS)(lengths)
    app.command("scales", help=SCALES)(scales)
    app.command("attention", help=ATTENTION)(attention)
    app.command("teacher-forcing", help=TEACHER_FORCING)(teacher_forcing)
    app.command("half-masked", help=HALF_MASKED)(half_masked)
    app.command("codebook", help=CODEBOOK)(codebook)
    app.command("weightings", help=WEIGHTINGS)(weightings)


def folder(out: Path | None, name: str) -> Path:
    """Where an analysis goes."""
    return out or Path("analysis") / name


def choose_device(device: str) -> "torch.device":
    """Where to compute: a GPU where there is one.

    Raises:
        UserError: a device that is not there.
    """
    from hmar_cli.launch import check_device

    check_device(device)
    import torch

    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_subjects(
    checkpoints: Sequence[Path], weights: str, tokenizer: Path | None, device: str
) -> "list[Subject]":
    """Load models that share a tokenizer, under names that differ."""
    place = choose_device(device)
    from hmar_cli.analysis.held_out import load_subject, require_same_tokenizer
    from hmar_cli.commands.curves import names

    titles = names(list(checkpoints))
    subjects = [
        load_subject(path, name, place, weights, tokenizer)
        for path, name in zip(checkpoints, titles, strict=True)
    ]
    require_same_tokenizer(subjects)
    return subjects


def lengths(
    resolutions: Annotated[str, typer.Option(help="Pixels at which steps are added: 256,512,1024.")] = "256",
    out: Out = None,
    as_json: drawing.AsJson = False,
) -> None:
    """Draw Figs 7 and 8; the help text is `LENGTHS`."""
    from hmar_cli.analysis.results import Row, print_analysis, save_analysis
    from hmar_cli.benchmarks.cases import RESOLUTIONS, lengths_by_resolution, lengths_by_steps
    from hmar_cli.benchmarks.charts import length_chart

    known = [str(pixels) for pixels in RESOLUTIONS]
    asked = [part.strip() for part in resolutions.split(",")]
    if unknown := [part for part in asked if part not in known]:
        raise UserError(
            f"--resolutions {resolutions}: no scales for {unknown[0]!r}", f"use {', '.join(known)}"
        )
    by_resolution = lengths_by_resolution()
    by_steps = {int(pixels): lengths_by_steps(RESOLUTIONS[int(pixels)]) for pixels in asked}
    rows: list[Row] = [{"figure": "7", **row} for row in by_resolution]
    rows += [{"figure": "8", "pixels": pixels, **row} for pixels, own in by_steps.items() for row in own]
    target = folder(out, "lengths")
    length_chart(by_resolution, by_steps, target / "lengths.png")
    settings = {"sides": {str(pixels): list(sides) for pixels, sides in RESOLUTIONS.items()}}
    files = save_analysis(target, "lengths", rows, settings, None)
    print_analysis("lengths", rows, settings, [target / "lengths.png", *files], as_json=as_json)


def scales(
    checkpoints: Checkpoints,
    data: Data,
    count: Count = 1000,
    mask_share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Of masked tokens a scale. [default: evenly over 0 to 1, as in training]"
        ),
    ] = None,
    seed: drawing.Seed = 0,
    batch_size: BatchSize = 32,
    weights: drawing.Weights = "",
    tokenizer: drawing.Tokenizer = None,
    device: drawing.Device = "",
    out: Out = None,
    as_json: drawing.AsJson = False,
) -> None:
    """Draw Figs 12, 16 and 22; the help text is `SCALES`."""
    subjects = load_subjects(checkpoints, weights, tokenizer, device)
    from hmar_cli.analysis.held_out import read_held_out
    from hmar_cli.analysis.results import print_analysis, save_analysis
    from hmar_cli.analysis.scales import measure_scales, scale_figure, summarize, tasks

    grids = subjects[0].model.scales
    held_out = read_held_out(data, subjects[0].codec, count=count, batch_size=batch_size)
    rows = [
        row
        for subject in subjects
        for task in tasks(subject)
        for row in measure_scales(subject, held_out, task, batch_size=batch_size, seed=seed, share=mask_share)
    ]
    settings = {
        "models": [subject.describe() for subject in subjects],
        "held_out": held_out.about,
        "sides": grids.sides(),
        "mask_share": mask_share,
        "seed": seed,
        "precision": "fp32",
    }
    summary = summarize(rows, grids)
    figure = scale_figure(rows, grids)
    files = save_analysis(folder(out, "scales"), "scales", rows, settings, figure, summary=summary)
    notes = [
        f"{each['model']}, {each['task']}: cross-entropy {each['cross_entropy']:.4g} nats, "
        f"accuracy {each['accuracy']:.2%} of all its tokens"
        for each in summary["totals"]
    ]
    print_analysis("scales", rows, settings, files, as_json=as_json, summary=summary, notes=notes)


def attention(
    checkpoints: Checkpoints,
    data: Annotated[
        str, typer.Option(help="Cache or source of images. [default: each model's own samples]")
    ] = "",
    count: Count = 64,
    seed: drawing.Seed = 0,
    batch_size: BatchSize = 16,
    weights: drawing.Weights = "",
    tokenizer: drawing.Tokenizer = None,
    device: drawing.Device = "",
    out: Out = None,
    as_json: drawing.AsJson = False,
) -> None:
    """Draw Figs 9 and 10; the help text is `ATTENTION`."""
    subjects = load_subjects(checkpoints, weights, tokenizer, device)
    from hmar_cli.analysis.attention import attention_figure, attention_rows, measure_attention, scale_pairs
    from hmar_cli.analysis.held_out import draw_held_out, read_held_out
    from hmar_cli.analysis.results import print_analysis, save_analysis

    given = read_held_out(data, subjects[0].codec, count=count, batch_size=batch_size) if data else None
    found, images = {}, {}
    for subject in subjects:
        shown = given or draw_held_out(subject, count=count, seed=seed, batch_size=batch_size)
        found[subject.name] = measure_attention(subject, shown, batch_size)
        images[subject.name] = shown.about
    rows = [row for name, patterns in found.items() for row in attention_rows(name, patterns)]
    pairs = [row for name, patterns in found.items() for row in scale_pairs(name, patterns)]
    settings = {
        "models": [subject.describe() for subject in subjects],
        "images": images,
        "sides": subjects[0].model.scales.sides(),
        "precision": "fp32",
    }
    target, summary = folder(out, "attention"), {"scale_pairs": pairs}
    files = save_analysis(target, "attention", rows, settings, attention_figure(found), summary=summary)
    print_analysis("attention", rows, settings, files, as_json=as_json, summary=summary, shown=pairs)


def open_bench(
    held_out: "HeldOut", subject: "Subject", extractor: str, weights: Path | None, batch_size: int, shown: int
) -> "tuple[Bench, dict[str, Any] | None]":
    """What versions of images are judged by, and its extractor for the record."""
    from hmar_cli.analysis.reconstruction import Bench
    from hmar_cli.evaluation.extractors import open_extractor

    looking = open_extractor(extractor, subject.device, weights) if extractor else None
    bench = Bench(held_out, subject.codec, looking, batch_size=batch_size, shown=shown)
    return bench, looking.describe() if looking else None


def next_scale_settings(subject: "Subject", given: dict[str, Any]) -> "NextScaleSample":
    """How a VAR or HMAR samples: by its recipe, but for the flags that were given."""
    from hmar_cli.settings import NextScaleSample

    settings = drawing.resolve(subject.checkpoint, given)
    assert isinstance(settings, NextScaleSample)
    return settings


def teacher_forcing(
    checkpoints: Checkpoints,
    data: Pictures,
    count: Count = 200,
    extractor: Extractor = "",
    extractor_weights: ExtractorWeights = None,
    cfg: drawing.Cfg = None,
    top_k: drawing.TopK = None,
    top_p: drawing.TopP = None,
    schedule: drawing.SchedulePasses = "recipe",
    refine_cfg: drawing.RefineCfg = None,
    shown: Shown = 8,
    seed: drawing.Seed = 0,
    batch_size: BatchSize = 32,
    weights: drawing.Weights = "",
    tokenizer: drawing.Tokenizer = None,
    device: drawing.Device = "",
    precision: drawing.Precision = "auto",
    out: Out = None,
    as_json: drawing.AsJson = False,
) -> None:
    """Draw Fig. 17; the help text is `TEACHER_FORCING`."""
    given = drawing.given_settings(
        {**dict.fromkeys(drawing.SETTINGS), "cfg": cfg, "top_k": top_k, "top_p": top_p}
        | {"schedule": schedule, "refine_cfg": refine_cfg}
    )
    subjects = load_subjects(checkpoints, weights, tokenizer, device)
    samplers = {subject.name: next_scale_settings(subject, given) for subject in subjects}
    from dataclasses import asdict

    from hmar_cli.analysis.held_out import read_held_out
    from hmar_cli.analysis.reconstruction import judge_all, known_scales, known_scales_figure
    from hmar_cli.analysis.results import print_analysis, save_analysis
    from hmar_cli.report import labelled_grid

    held_out = read_held_out(data, subjects[0].codec, count=count, batch_size=batch_size, pictures=True)
    bench, judge = open_bench(held_out, subjects[0], extractor, extractor_weights, batch_size, shown)
    versions = [
        version
        for subject in subjects
        for version in known_scales(subject, held_out, samplers[subject.name], seed=seed, precision=precision)
    ]
    rows, tiles = judge_all(bench, versions)
    settings = {
        "models": [{**subject.describe(), "sample": asdict(samplers[subject.name])} for subject in subjects],
        "held_out": held_out.about,
        "extractor": judge,
        "seed": seed,
        "precision": precision,
    }
    name, figure = "teacher-forcing", known_scales_figure(rows, subjects[0].model.scales)
    files = save_analysis(folder(out, name), name, rows, settings, figure, grid=labelled_grid(tiles))
    print_analysis(name, rows, settings, files, as_json=as_json)


def half_masked(
    checkpoints: Checkpoints,
    data: Pictures,
    count: Count = 200,
    share: Annotated[float, typer.Option(min=0, max=1, help="Of masked tokens of every scale.")] = 0.5,
    extractor: Extractor = "",
    extractor_weights: ExtractorWeights = None,
    shown: Shown = 8,
    seed: drawing.Seed = 0,
    batch_size: BatchSize = 32,
    weights: drawing.Weights = "",
    tokenizer: drawing.Tokenizer = None,
    device: drawing.Device = "",
    out: Out = None,
    as_json: drawing.AsJson = False,
) -> None:
    """Draw Fig. 18; the help text is `HALF_MASKED`."""
    subjects = load_subjects(checkpoints, weights, tokenizer, device)
    if all(subject.model.masked is None for subject in subjects):
        raise UserError(
            f"{checkpoints[0]} has no masked branch",
            "give a model that `hmar finetune-masked` made, alone or among others",
        )
    from hmar_cli.analysis import reconstruction
    from hmar_cli.analysis.held_out import read_held_out
    from hmar_cli.analysis.results import print_analysis, save_analysis
    from hmar_cli.report import labelled_grid

    held_out = read_held_out(data, subjects[0].codec, count=count, batch_size=batch_size, pictures=True)
    bench, judge = open_bench(held_out, subjects[0], extractor, extractor_weights, batch_size, shown)
    versions = reconstruction.half_masked(subjects, held_out, share=share, seed=seed)
    rows, tiles = reconstruction.judge_all(bench, versions)
    settings = {
        "models": [subject.describe() for subject in subjects],
        "held_out": held_out.about,
        "extractor": judge,
        "share": share,
        "seed": seed,
        "precision": "fp32",
    }
    name, figure = "half-masked", reconstruction.half_masked_figure(rows)
    files = save_analysis(folder(out, name), name, rows, settings, figure, grid=labelled_grid(tiles))
    print_analysis(name, rows, settings, files, as_json=as_json)


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
    place = choose_device(device)
    if not data and not (path / "manifest.json").is_file():
        raise UserError("--data is missing", f"{path} is no cache, so say which images are to be encoded")
    from hmar_cli.analysis.codebook import codebook_figure, codebook_rows, rank_curves
    from hmar_cli.analysis.held_out import load_msvq, read_held_out
    from hmar_cli.analysis.results import print_analysis, save_analysis
    from hmar_cli.evaluation.codes import count_codes

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
    files = save_analysis(folder(out, "codebook"), "codebook", rows, settings, figure, summary=summary)
    print_analysis("codebook", rows, settings, files, as_json=as_json, summary=summary)


def weightings(
    sides: Annotated[
        str, typer.Option(help="A scale list, such as 1,2,3x4. [default: that of 256 pixels]")
    ] = "",
    out: Out = None,
    as_json: drawing.AsJson = False,
) -> None:
    """Draw Fig. 13; the help text is `WEIGHTINGS`."""
    from hmar_cli.analysis.results import print_analysis, save_analysis
    from hmar_cli.analysis.weightings import weighting_figure, weighting_rows
    from hmar_cli.benchmarks.cases import RESOLUTIONS, parse_sides
    from hmar_cli.models.scales import Scales

    scales = parse_sides(sides) if sides else Scales.of(RESOLUTIONS[256])
    rows, settings = weighting_rows(scales), {"sides": scales.sides()}
    figure = weighting_figure(rows, scales)
    files = save_analysis(folder(out, "weightings"), "weightings", rows, settings, figure)
    print_analysis("weightings", rows, settings, files, as_json=as_json)

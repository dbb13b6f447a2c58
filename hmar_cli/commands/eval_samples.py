"""`hmar eval samples`: how far images are from real ones, and how varied they are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmar_cli.commands import drawing
from hmar_cli.commands.flags import given, refuse_fixed, require_places, with_flags
from hmar_cli.errors import UserError
from hmar_cli.files import require_writable

if TYPE_CHECKING:
    from hmar_cli.commands.evaluating import Plan

EXAMPLES = """
Measure images: how far they are from real ones (FID, sFID, KID), how many look real and how much of what is real they
cover (precision, recall), and the Inception Score.

SUBJECT is what `hmar sample` wrote, any other source of images (a folder, parquet, a name of the hub, an `.npz` of
ADM's with `arr_0`), or a checkpoint: that draws its images first, on all processes of `--launch`. They lie in the
cache until they are measured, so that an interrupted run goes on; `--keep` keeps them. `--reference` is any source of
real images, an `.npz` of ADM's with statistics, or one that `--make-stats` wrote.

`--extractor` is the network whose features are compared: Inception as torch-fidelity has it, an image tower of
open_clip, a TorchScript file, a function of a module, or a classifier that `hmar train` made. Only the published
Inception gives numbers that are called FID; all others bear their extractor's name, and each its number of images:
`FID-50k`, `FID[classifier-cifar10]-10k`. `hmar eval compare` says which of them compare.

With a classifier, accuracy is the share of images that it assigns to the class that they were drawn as.

**Presets** fix extractor, metrics, number of images, size, crop and reference as papers do:
`adm-imagenet-256` and `adm-imagenet-512` (ADM's statistics files, downloaded once or given), `coco-30k` (30,000
prompts of the reference's captions; give COCO's validation set). The one of tokenizers is `hmar eval tokenizer`'s.

**Examples**

- `hmar eval samples samples/hmar --reference cifar10-test.parquet --extractor runs/classifier-cifar10`
- `hmar eval samples runs/var-d16 --preset adm-imagenet-256 --launch 8 --out var-d16.json`
- `hmar eval samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is`
- `hmar eval samples runs/hmar --count 2000 --reference photos/ --extractor open_clip:ViT-B-32/openai --cfg 2`
- `hmar eval samples runs/himar-coco --preset coco-30k --reference "coco:captions_val2014.json?images=val2014"`
- `hmar eval samples photos/ --size 256 --metrics fid,precision,recall --make-stats photos-256.npz`
- `hmar eval samples cifar10-test.parquet --extractor runs/classifier-of-samples --json`
"""

Crops = Literal["adm", "var"]


def register(app: typer.Typer) -> None:
    """Add the command to `hmar eval`."""
    app.command("samples", help=EXAMPLES)(samples)


@with_flags
def samples(
    subject: Annotated[str, typer.Argument(help="Images, or a checkpoint.", show_default=False)],
    contents: drawing.Contents,
    sampler: drawing.Sampler,
    loading: drawing.Drawing,
    reference: Annotated[str, typer.Option(help="Real images, or their statistics.")] = "",
    metrics: Annotated[
        str, typer.Option(help="Of fid,sfid,is,kid,precision,recall. [default: fid, with a reference]")
    ] = "",
    extractor: Annotated[
        str, typer.Option(help="inception, open_clip:…, torchscript:…, module:… or a classifier's run.")
    ] = "",
    extractor_weights: drawing.ExtractorWeights = None,
    preset: Annotated[str, typer.Option(help="adm-imagenet-256, adm-imagenet-512 or coco-30k.")] = "",
    count: Annotated[int, typer.Option(min=0, help="Of the first images, or to draw; 0 is all.")] = 0,
    size: Annotated[
        int, typer.Option(min=0, help="To which images are cut. [default: the classifier's, or as they are]")
    ] = 0,
    crop: Annotated[
        Crops | None, typer.Option(help="How: the centre as ADM or VAR cut it. [default: adm]")
    ] = None,
    make_stats: Annotated[
        Path | None, typer.Option(help="Write statistics of SUBJECT for --metrics to this .npz.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report to this JSON file, and a grid.")] = None,
    grid: Annotated[
        Path | None, typer.Option(help="PNG of the first images. [default: beside --out]")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Folder that keeps the images of a checkpoint.")] = None,
    draw_batch: Annotated[
        int, typer.Option(min=0, help="Images drawn at once; 0 is the recipe's number.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images measured at once.")] = 64,
    device: drawing.Device = "",
    launch: drawing.Launch = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure images; the help text is `EXAMPLES`."""
    from hmar_cli.commands.subjects import condensed, is_checkpoint, order_images
    from hmar_cli.launch import check_device, delegate

    check_device(device)
    picture = require_places(out, grid)
    if make_stats:
        require_writable(make_stats)
    wanted = {
        "extractor": extractor,
        "metrics": metrics,
        "count": count,
        "size": size,
        "crop": crop,
        "labels": contents.labels,
    }
    plan = choose(wanted, preset, reference, extractor_weights, make_stats, batch_size, not dry_run)
    order = None
    if is_checkpoint(Path(subject)):
        order = order_images(
            Path(subject), given(sampler), loading, contents, plan.count, draw_batch, plan.reference
        )
    else:
        asked = {
            **given(contents),
            **given(sampler),
            **given(loading),
            "draw_batch": draw_batch,
            "keep": keep,
        }
        refuse_drawing(subject, asked)
    if dry_run and as_json:
        drawn = condensed(order.job().describe()) if order else None
        print(json.dumps({"subject": subject, "draw": drawn, "measure": plan.describe()}, indent=2))
        return
    if dry_run:
        lines = order.outline() if order else {"images": subject}
        drawing.print_plan({**lines, **plan.outline()})
        return
    delegate(launch, device)
    from hmar_cli.commands.evaluating import evaluate, print_report
    from hmar_cli.evaluation.reports import publish

    report = evaluate(subject, order, plan, keep=keep, device=device, grid=picture)
    if report is None:  # not the process that reports
        return
    publish(report, out, as_json=as_json, show=print_report)


def choose(
    wanted: Mapping[str, Any],
    preset: str,
    reference: str,
    weights: Path | None,
    make_stats: Path | None,
    batch_size: int,
    fetch: bool = True,
) -> "Plan":
    """What the flags come to.

    Args:
        wanted: flags that a preset fixes: extractor, metrics, count, size, crop, labels; empty where not given.
        preset: its name, or "".
        reference: its spelling, or "".
        weights: a file of the extractor's.
        make_stats: where the statistics of the images go.
        batch_size: images at once.
        fetch: download the reference of a preset, if need be.

    Raises:
        UserError: an unknown preset or metric, a flag that contradicts the preset, or nothing to measure.
    """
    from hmar_cli.commands.evaluating import Plan
    from hmar_cli.evaluation.measures import needs_reference, parse_metrics
    from hmar_cli.evaluation.presets import find_preset, preset_reference

    shared: dict[str, Any] = {"weights": weights, "make_stats": make_stats, "batch_size": batch_size}
    if preset:
        fixed = find_preset(preset)
        refuse_fixed(preset, wanted)
        return Plan(
            metrics=fixed.metrics,
            extractor=fixed.extractor,
            reference=preset_reference(preset, fixed, reference, fetch),
            count=fixed.count,
            size=fixed.size,
            crop=fixed.crop,
            preset=preset,
            **shared,
        )
    named = parse_metrics(wanted["metrics"]) if wanted["metrics"] else ()
    if named and needs_reference(named) and not reference and not make_stats:
        raise UserError(
            f"--metrics {','.join(named)} compares with real images, and there are none",
            "give --reference SOURCE, or a file of statistics",
        )
    if not (named or reference or make_stats or wanted["extractor"]):
        raise UserError(
            "nothing to measure", "give --reference SOURCE, --preset NAME, --metrics is, or a classifier"
        )
    return Plan(
        metrics=named or (("fid",) if reference or make_stats else ()),
        extractor=wanted["extractor"] or "inception",
        reference=reference,
        count=wanted["count"],
        size=wanted["size"] or None,
        crop=wanted["crop"] or "adm",
        preset="",
        **shared,
    )


def refuse_drawing(subject: str, asked: Mapping[str, Any]) -> None:
    """Refuse flags that say how to draw, where nothing is drawn.

    Raises:
        UserError: naming them.
    """
    if flags := [name.replace("_", "-") for name, value in asked.items() if value]:
        raise UserError(
            f"{subject} is no checkpoint: nothing is drawn by --{', --'.join(flags)}",
            "leave them out, or give a checkpoint",
        )

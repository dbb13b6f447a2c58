"""`hmar eval edits`: measure how well a model fills regions of pictures that it has never seen."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmar_cli.commands import drawing
from hmar_cli.commands.flags import choose, given, with_flags
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    import torch

    from hmar_cli.checkpoints.store import Checkpoint
    from hmar_cli.data.transforms import Pixels
    from hmar_cli.evaluation.edits import Fill, HeldOut, Report
    from hmar_cli.pictures.painter import ModelPainter
    from hmar_cli.sampling.editing import EditSettings
    from hmar_cli.sampling.images import Conditions

EXAMPLES = """
Measure how well a model fills regions of pictures that it has never seen, as `hmar edit --inpaint` would.

Of every picture of SOURCE, scaled and centre-cropped to the model's size, three regions are filled: `centre` (the
middle half of each side), `half` (the right half) and `free-form` (random strokes). The original is the answer.
PSNR within the region and the distance of a classifier's features between the filled picture and the original are
means over pictures; `FID[...]` is the Fréchet distance of the set by the classifier's features, `class` the share of
pictures whose class the classifier still finds, and `seam` the mean step of colour across the region's edge, in
levels of 0 to 255. Without `--extractor` there are PSNR and seam alone.

Beside the model stand what its tokenizer makes of the originals (no model can do much better), a smooth continuation
of what is kept, its mean colour, and the same region of another picture (chance). Images and masks depend on SOURCE
and the seed alone, so that models compare; distances compare where the classifier is the same.

**Examples**

- `hmar eval edits "builtin:shapes?seed=1" --checkpoint runs/hmar-masked --extractor runs/classifier-tiny`
- `hmar eval edits cifar10-test.parquet --checkpoint runs/himar --extractor runs/classifier-cifar10 --labels none`
- `hmar eval edits photos/ --checkpoint runs/hmar-masked --labels none --schedule none --grid fills.png`
"""

MODEL, TOKENIZER = "model", "tokenizer"


def register(app: typer.Typer) -> None:
    """Add the command to `hmar eval`."""
    app.command("edits", help=EXAMPLES)(edits)


@with_flags
def edits(
    source: Annotated[str, typer.Argument(help="Source of images.", show_default=False)],
    checkpoint: drawing.Checkpoint,
    sampler: drawing.Sampler,
    loading: drawing.Loading,
    extractor: Annotated[
        str,
        typer.Option(
            help="A classifier's run, or another, as of `hmar eval samples`. [default: PSNR and seams alone]"
        ),
    ] = "",
    count: Annotated[int, typer.Option(min=2, help="Of the source's first images.")] = 300,
    masks: Annotated[str, typer.Option(help="Of centre, half and free-form, by commas. [default: all]")] = "",
    labels: Annotated[
        Literal["given", "none"], typer.Option(help="The picture's own class, or text; or none.")
    ] = "given",
    strength: Annotated[float, typer.Option(min=0, max=1, help="As of `hmar edit`, above 0.")] = 1.0,
    keep_scales: Annotated[
        int | None,
        typer.Option(min=0, rich_help_panel=drawing.NEXT_SCALE_PANEL, help="As of `hmar edit`. [default: 1]"),
    ] = None,
    erase: Annotated[
        bool | None, typer.Option("--erase/--no-erase", help="As of `hmar edit`, with its default.")
    ] = None,
    match_colours: Annotated[
        bool,
        typer.Option(
            " /--no-match-colours",
            help="Leave the tokenizer's shift of colours in.",
            show_default=False,
        ),
    ] = True,
    grid: Annotated[Path | None, typer.Option(help="PNG file for some pictures and their fills.")] = None,
    shown: Annotated[int, typer.Option(min=1, max=64, help="Pictures of each mask in it.")] = 6,
    batch_size: drawing.BatchSize = 0,
    device: drawing.Device = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every setting.")] = False,
) -> None:
    """Measure fills; the help text is `EXAMPLES`."""
    asked, seed = given(sampler), loading.seed
    from hmar_cli.checkpoints.store import open_checkpoint
    from hmar_cli.evaluation.edits import MASKS
    from hmar_cli.launch import choose_device
    from hmar_cli.pictures.request import edit_settings, erases

    place = choose_device(device)
    wanted = choose("--masks", masks, MASKS, "mask")
    opened = open_checkpoint(checkpoint)
    settings = drawing.resolve(opened, asked)
    chosen = edit_settings(opened.recipe.tokenizer, False, strength, keep_scales)
    check_guides(labels, asked)
    from hmar_cli.evaluation.edits import measure_fills, yardsticks
    from hmar_cli.evaluation.extractors import open_extractor
    from hmar_cli.evaluation.measures import metric_name

    judge = open_extractor(extractor, place) if extractor else None
    painter, held_out = open_painter(opened, loading, settings, chosen, source, count, labels, place)
    erased = erases(chosen, whole=False) if erase is None else erase
    together = batch_size or opened.recipe.sample.batch_size
    _say_what_is_left_out(held_out, painter.select_attention(together))
    report = measure_fills(
        judge,
        held_out,
        {**model_fills(painter, match_colours, erased), **yardsticks(held_out, seed)},
        masks=wanted,
        seed=seed,
        batch_size=together,
        shown=shown if grid else 0,
    )
    if grid:
        save_grid(report, held_out, seed, grid)
    name = metric_name("fid", judge, len(held_out.pixels)) if judge else ""
    if not as_json:
        print_report(name, report, held_out)
        return
    about = {
        "metric": name or None,
        **opened.describe(loading.weights),
        "parameters": sum(each.numel() for each in painter.model.parameters()),
        "tokenizer_hash": opened.tokenizer_hash or painter.tokenizer.fingerprint(),
        "labels": labels,
        **asdict(chosen),
        "erase": erased,
        "match_colours": match_colours,
        "seed": seed,
        **{key: value for key, value in asdict(painter.settings).items() if key != "batch_size"},
        "precision": painter.precision,
        "batch_size": together,
        "device": str(place),
        "extractor": judge and judge.describe(),
        **describe_report(report, held_out),
    }
    print(json.dumps(about, indent=2, ensure_ascii=False))


def check_guides(labels: str, asked: Mapping[str, Any]) -> None:
    """See that nothing guides towards a class where none is given.

    Raises:
        UserError: guidance without classes.
    """
    guides = [name for name in ("cfg", "pivot_cfg", "refine_cfg") if name in asked]
    if labels == "none" and guides:
        raise UserError(
            f"--{guides[0].replace('_', '-')} guides towards a class, and --labels is none", "leave one out"
        )


def open_painter(
    checkpoint: "Checkpoint",
    loading: drawing.Loading,
    settings: Any,
    chosen: "EditSettings",
    source: str,
    count: int,
    labels: str,
    place: "torch.device",
) -> "tuple[ModelPainter, HeldOut]":
    """The model on its device, and the pictures at its size.

    Raises:
        UserError: one of them cannot be had, or pictures have classes or texts that the model cannot follow.
    """
    from hmar_cli.builders import load_model
    from hmar_cli.data.sources import open_source
    from hmar_cli.evaluation.edits import read_held_out
    from hmar_cli.pictures.painter import ModelPainter
    from hmar_cli.sampling.editing import model_size

    model, codec, _ = load_model(checkpoint.folder, loading.weights, loading.tokenizer)
    size = model_size(model, codec)
    held_out = read_held_out(open_source(source, size=size), size, count)
    conditions = None if labels == "none" else own_conditions(checkpoint, held_out, loading.text_weights)
    painter = ModelPainter(
        model.to(place),
        codec.to(place),
        conditions,
        settings,
        chosen,
        seed=loading.seed,
        precision=loading.precision,
    )
    return painter, held_out


def describe_report(report: "Report", held_out: "HeldOut") -> dict[str, Any]:
    """What was found of which pictures, for the record."""
    return {
        "source": held_out.source,
        "count": len(held_out.pixels),
        "unreadable": held_out.unreadable,
        **({"originals_right": report.right} if report.labelled else {}),
        "region": report.shares,
        "originals_seam": report.seams,
        "rows": [row.describe(report.labelled) for row in report.rows],
    }


def _say_what_is_left_out(held_out: "HeldOut", attention: str) -> None:
    from hmar_cli.console import console, warn

    if attention:
        console.print(attention, highlight=False)
    if held_out.unreadable:
        warn(f"left out {held_out.unreadable} images of {held_out.source}; {held_out.error}")


def own_conditions(checkpoint: "Checkpoint", held_out: "HeldOut", text_weights: Path | None) -> "Conditions":
    """The class of each picture, or its text for a model that reads texts.

    Raises:
        UserError: the model does not know a class, or pictures come without texts.
    """
    text = drawing.text_settings(checkpoint, text_weights)
    if text is not None:
        if not all(held_out.captions):
            raise UserError(f"{held_out.source} has pictures without captions", "use --labels none")
        return drawing.conditions_for(text, [], list(held_out.captions))
    from hmar_cli.data.images import UNLABELLED, class_places

    places = class_places(held_out.class_names, checkpoint.class_names)
    if -1 in places:
        unknown = held_out.class_names[places.index(-1)]
        known = f"{checkpoint.folder} knows no class {unknown!r}, which {held_out.source} has"
        none = f"{held_out.source} has pictures without classes"
        raise UserError(none if held_out.class_names == UNLABELLED else known, "use --labels none")
    classes = [places[label] for label in held_out.labels]
    return drawing.conditions_for(None, classes, [])


def model_fills(painter: "ModelPainter", match: bool, erase: bool) -> "dict[str, Fill]":
    """What the model draws, what its tokenizer makes of the originals, and a continuation of what is kept."""
    import numpy as np

    from hmar_cli.pictures.compositing import extend
    from hmar_cli.pictures.editing import fill_region

    def model(numbers: Sequence[int], pictures: "Pixels", region: "Pixels") -> "Pixels":
        return fill_region(pictures, region, painter, numbers, match=match, erase=erase)

    def tokenizer(numbers: Sequence[int], pictures: "Pixels", region: "Pixels") -> "Pixels":
        return np.stack([painter.reconstruct(picture) for picture in pictures])

    def smooth(numbers: Sequence[int], pictures: "Pixels", region: "Pixels") -> "Pixels":
        filled = np.stack([extend(picture.astype(np.float32), region == 0) for picture in pictures])
        rounded: Pixels = filled.round().clip(0, 255).astype(np.uint8)
        return rounded

    return {MODEL: model, TOKENIZER: tokenizer, "smooth continuation": smooth}


def save_grid(report: "Report", held_out: "HeldOut", seed: int, target: Path) -> None:
    """Write original, region and fills of the first pictures, a row for each picture and mask."""
    import numpy as np

    from hmar_cli.evaluation.edits import region_of
    from hmar_cli.report import image_grid, save_png

    tiles, captions = [], []
    fills = list(dict.fromkeys(row.fill for row in report.rows))
    for mask in report.shares:
        rows = [row for row in report.rows if row.mask == mask]
        for number in range(len(rows[0].shown)):
            original = held_out.pixels[number]
            region = region_of(mask, original.shape[:2], seed, number)[..., None]
            hidden = np.where(region > 0, np.uint8(128), original)
            tiles += [original, hidden, *(row.shown[number] for row in rows)]
            captions += ["original", mask, *fills] if number == 0 else [""] * (2 + len(fills))
    save_png(image_grid(tiles, 2 + len(fills), captions=captions), target)


def print_report(name: str, report: "Report", held_out: "HeldOut") -> None:
    """Print a table for people; without `name` nothing was measured by features."""
    count = len(held_out.pixels)
    width = max(len(name), 8)
    head = f"{'region':10} {'filled by':20} {'PSNR':>6}"
    head += f" {'distance':>9} {name:>{width}}" if name else ""
    print(f"{head} {'seam':>6}" + f" {'class':>7}" * report.labelled)
    for row in report.rows:
        about = row.describe(report.labelled)
        line = f"{row.mask:10} {row.fill:20} {about['psnr']:6.2f}"
        line += f" {about['distance']:9.4g} {about['frechet']:{width}.4g}" if name else ""
        line += f" {about['seam']:6.2f}"
        print(line + (f" {about['accuracy']:7.1%}" if report.labelled else ""))
    shares = ", ".join(f"{mask} {share:.0%}" for mask, share in report.shares.items())
    print(f"{count} images of {held_out.source}; regions cover: {shares}")
    print(
        "seams of the originals: " + ", ".join(f"{mask} {value:.2f}" for mask, value in report.seams.items())
    )
    if report.labelled:
        print(f"class of the originals: {report.right / count:.1%}")

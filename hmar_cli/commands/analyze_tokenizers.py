"""`hmar analyze tokenizers`: how well tokenizers reconstruct sets of images, at several sizes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmar_cli.commands import drawing
from hmar_cli.commands.flags import short_names, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hmar_cli.analysis.results import Cell, Row
    from hmar_cli.checkpoints.store import Checkpoint
    from hmar_cli.data.transforms import Pixels
    from hmar_cli.evaluation.reports import Report
    from hmar_cli.models.scales import Side

EXAMPLES = """
PSNR, SSIM, rFID and use of codes of tokenizers, on sets of images and at sizes (HMAR supplement E.1, Table 5).

A row for each tokenizer, set and size, each measured as `hmar eval tokenizer` does; in the paper ImageNet's
validation images at 256 and 512 pixels (20.69 and 21.74 dB). A tokenizer is convolutional, so it takes other sizes
than that of its training, a multi-scale VQ one with scales in proportion; `native` leaves images at their own sizes.
The grid shows images, and below them what each tokenizer makes of them.

**Examples**

- `hmar analyze tokenizers runs/msvq-tin40 runs/kl-tin40 --images kodak24.parquet --sizes native`
- `hmar analyze tokenizers checkpoints/msvq-256 --images imagenet-val/ --sizes 256,512 --extractor inception`
- `hmar analyze tokenizers runs/msvq-cifar10 --images cifar10-test.parquet --images kodak24.parquet --sizes 32,256
  --extractor runs/classifier-cifar10`
"""

NATIVE, TRAINED = "native", ""
"""Words of `--sizes` for images as they are, and for the size of each tokenizer's training."""

UNITS = {"PSNR": "PSNR (dB)"}
"""Columns that are measured in something."""

TILE = 256
"""Most pixels of a side of the grid's pictures, which are scaled and cut to one square."""


def register(app: typer.Typer) -> None:
    """Add the command to `hmar analyze`."""
    app.command("tokenizers", help=EXAMPLES)(tokenizers)


def tokenizers(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Tokenizers, or what carries one.", show_default=False)
    ],
    images: Annotated[list[str], typer.Option(help="Source of images; may be repeated.", show_default=False)],
    sizes: Annotated[
        str, typer.Option(help="Sides or WIDTHxHEIGHT by commas, or native. [default: as in training]")
    ] = "",
    crop: Annotated[Literal["adm", "var"], typer.Option(help="How images are scaled and cut.")] = "adm",
    count: Annotated[int, typer.Option(min=0, help="Of each source's first images; 0 is all.")] = 0,
    extractor: Annotated[str, typer.Option(help="Of the rFID. [default: no rFID]")] = "",
    extractor_weights: drawing.ExtractorWeights = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 16,
    shown: Annotated[int, typer.Option(min=1, max=64, help="Images of each set in the grid.")] = 8,
    device: drawing.Device = "",
    launch: drawing.Launch = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the files. [default: analysis/tokenizers]")
    ] = None,
    as_json: drawing.AsJson = False,
) -> None:
    """Draw Table 5; the help text is `EXAMPLES`."""
    from hmar_cli.builders import find_tokenizer
    from hmar_cli.commands import eval_tokenizer
    from hmar_cli.launch import check_device, delegate, join_processes, leave_processes

    check_device(device)
    opened = dict(zip(short_names(checkpoints), map(find_tokenizer, checkpoints), strict=True))
    wanted = words(sizes) or [TRAINED]
    cases = [(images_of, size, name) for images_of in images for size in wanted for name in opened]
    sides = {
        (size, name): side_of(size, opened[name]) for _, size, name in cases
    }  # a mistake shows before work
    delegate(launch, device)
    from hmar_cli.analysis.results import analysis_folder, publish_analysis
    from hmar_cli.data.sources import open_source
    from hmar_cli.evaluation.extractors import open_extractor

    analysis_folder(out, "tokenizers")
    place = join_processes(device)
    judge = open_extractor(extractor, place.device, extractor_weights) if extractor else None
    framed = [
        eval_tokenizer.framed(
            opened[name],
            open_source(spelling, size=sides[size, name]),
            sides[size, name],
            crop,
            count=count,
            batch_size=batch_size,
            share=place.share,
        )
        for spelling, size, name in cases
    ]  # all are there, and of a size that suits, before the first is measured
    brief = [short(each) for each in images]
    titles = {
        each: name if brief.count(name) == 1 else each for each, name in zip(images, brief, strict=True)
    }
    rows: list[Row] = []
    reports: list[dict[str, Any]] = []
    notes: list[str] = []
    pictures: dict[str, list[Pixels]] = {}
    for (spelling, _, name), frames in zip(cases, framed, strict=True):
        found = eval_tokenizer.measure(opened[name], frames, judge, place.device, shown)
        report = eval_tokenizer.make_report(opened[name], frames, judge, found, "", str(place.device))
        reports.append(report.describe())
        notes += [f"{name}: {line}" for line in eval_tokenizer.warnings(frames, found)]
        rows.append(row_of(name, titles[spelling], report))
        if place.rank == 0:
            originals, copies = map(list, zip(*found.pairs, strict=True))
            pictures.setdefault(titles[spelling], originals)
            pictures[f"{name}: {rows[-1]['pixels']}, {titles[spelling]}"] = copies
    leave_processes()
    if place.rank:
        return
    settings = {"shown": shown, "reports": reports}
    publish_analysis(
        out,
        "tokenizers",
        rows,
        settings,
        draw(rows),
        as_json=as_json,
        tiles=squares(pictures),
        notes=notes,
    )


def side_of(size: str, checkpoint: "Checkpoint") -> "Side | None":
    """The size that a word of `--sizes` means for a tokenizer; None leaves images as they are.

    Raises:
        UserError: a word that is none.
    """
    from hmar_cli.commands.eval_tokenizer import parse_size

    if size == NATIVE:
        return None
    return checkpoint.recipe.data.size if size == TRAINED else parse_size(size)


def short(spelling: str) -> str:
    """A source of images in few letters: of a path its end."""
    return spelling.rstrip("/").rpartition("/")[2] if Path(spelling.partition("?")[0]).exists() else spelling


def row_of(name: str, images: str, report: "Report") -> "dict[str, Cell]":
    """The row of a tokenizer on a set of images: means over the images."""
    about = report.settings["images"]
    sizes = " ".join(about["sizes"])
    row: dict[str, Cell] = {"tokenizer": name, "images": images, "pixels": sizes, "count": about["count"]}
    return row | {UNITS.get(number.name, number.name): number.value for number in report.metrics.values()}


def draw(rows: "Sequence[Row]") -> "Figure":
    """A bar a row, in panels of PSNR, SSIM and rFID."""
    from hmar_cli.report import bar_figure

    several = len({row["images"] for row in rows}) > 1
    names = [f"{row['tokenizer']}, {row['pixels']}" + f"\n{row['images']}" * several for row in rows]
    keys = dict.fromkeys(key for row in rows for key in row)
    distances = [key for key in keys if key.startswith("rFID")]
    panels = {f"{key}, higher is better": [key] for key in (UNITS["PSNR"], "SSIM") if key in keys}
    if distances:
        title = distances[0] if len(distances) == 1 else distances[0].rpartition("-")[0]
        panels[f"{title}, lower is better"] = distances
    return bar_figure(
        names,
        {
            title: [[float(row[key] or 0) for key in several_keys if key in row] for row in rows]
            for title, several_keys in panels.items()
        },
    )


def squares(pictures: "Mapping[str, Sequence[Pixels]]") -> "dict[str, list[Pixels]]":
    """Images of any sizes as squares of one side, at most `TILE` pixels, scaled and cut around the middle."""
    from PIL import Image

    from hmar_cli.data.transforms import image_transform

    side = min(TILE, max(max(each.shape[:2]) for images in pictures.values() for each in images))
    cut = image_transform(side, "adm", train=False)
    return {label: [cut(Image.fromarray(each)) for each in images] for label, images in pictures.items()}

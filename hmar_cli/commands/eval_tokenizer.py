"""`hmar eval tokenizer`: how well a tokenizer reconstructs images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmar_cli.commands import drawing
from hmar_cli.commands.flags import refuse_fixed, require_places
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.checkpoints.store import Checkpoint
    from hmar_cli.data.frames import FramedImages
    from hmar_cli.data.images import ImageSource
    from hmar_cli.data.transforms import Crop
    from hmar_cli.evaluation.extractors import Extractor
    from hmar_cli.evaluation.reconstruction import Reconstructions
    from hmar_cli.evaluation.reports import Report
    from hmar_cli.models.scales import Side
    from hmar_cli.tokenizers.losses import Lpips

EXAMPLES = """
Measure how well a tokenizer reconstructs images that it has never seen, and how it uses its codes or latents.

CHECKPOINT is a tokenizer, a model or a cache that carries one; IMAGES is a picture or any other source. Images are
scaled and centre-cropped to the size at which the tokenizer was trained, to `--size`, or with `--native` left at
their own sizes, less what the stride does not divide. A multi-scale VQ tokenizer gets scales in proportion to the
size.

PSNR (dB), SSIM and L1 (black is -1, white 1) are means over images, with their standard deviation, and with `--lpips`
LPIPS too; all are of images of 8 bits. With `--extractor`, rFID is the Fréchet distance of the features of
reconstructions from those of the images: `rFID-50k` of Inception, `rFID[classifier-cifar10]-10k` of a classifier. Of
codes, usage is the share of the codebook that occurs, and perplexity the number of codes that would be as varied if
all came equally often; of latents, `std` is the standard deviation before any scale.

`--preset tokenizer` measures as papers do (VAR; HMAR, supplement, Table 5): ImageNet's 50,000 validation images, the
tokenizer's own size, ADM's crop, Inception.

**Examples**

- `hmar eval tokenizer runs/msvq-cifar10 cifar10-test.parquet --extractor runs/classifier-cifar10`
- `hmar eval tokenizer checkpoints/msvq-256 imagenet-val/ --preset tokenizer --launch 8 --out msvq-256.json`
- `hmar eval tokenizer runs/msvq-tin40 kodak24.parquet --native --grid kodak.png`
- `hmar eval tokenizer runs/kl-tin40 photos/ --size 512x256 --count 100 --json`
"""

PRESET_COUNT = 50_000
"""Images of ImageNet's validation set, and of `rFID-50k`."""


def register(app: typer.Typer) -> None:
    """Add the command to `hmar eval`."""
    app.command("tokenizer", help=EXAMPLES)(tokenizer)


def tokenizer(
    checkpoint: Annotated[Path, typer.Argument(help="Tokenizer, or what carries one.", show_default=False)],
    images: Annotated[str, typer.Argument(help="Source of images.", show_default=False)],
    size: Annotated[
        str, typer.Option(help="Side, or WIDTHxHEIGHT, of the images. [default: as in training]")
    ] = "",
    native: Annotated[bool, typer.Option("--native", help="Leave every image at its own size.")] = False,
    crop: Annotated[
        Literal["adm", "var"] | None, typer.Option(help="How images are scaled and cut. [default: adm]")
    ] = None,
    count: Annotated[int, typer.Option(min=0, help="Of the first images; 0 is all.")] = 0,
    extractor: Annotated[
        str, typer.Option(help="Of the rFID: inception, a classifier's checkpoint, ... [default: no rFID]")
    ] = "",
    extractor_weights: drawing.ExtractorWeights = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="Also LPIPS with VGG16, downloaded once.")] = False,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="File of LPIPS's weights, in place of the download.")
    ] = None,
    preset: Annotated[
        Literal["tokenizer"] | None, typer.Option(help="Measure as papers do: tokenizer.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 16,
    out: Annotated[Path | None, typer.Option(help="JSON file for the report.")] = None,
    grid: Annotated[
        Path | None,
        typer.Option(help="PNG file of images above their reconstructions. [default: beside --out]"),
    ] = None,
    shown: Annotated[int, typer.Option(min=1, help="First images that it shows.")] = 16,
    device: drawing.Device = "",
    launch: drawing.Launch = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure a tokenizer; the help text is `EXAMPLES`."""
    from hmar_cli.builders import find_tokenizer
    from hmar_cli.launch import check_device, delegate, join_processes, leave_processes

    check_device(device)
    picture = require_places(out, grid)
    if preset:
        refuse_fixed(
            preset, {"size": size, "native": native, "crop": crop, "count": count, "extractor": extractor}
        )
        extractor, count = "inception", PRESET_COUNT
    if native and (size or crop):
        raise UserError(
            "--native scales no image", f"leave out {'--size' if size else '--crop'}, or --native"
        )
    source, wanted = find_tokenizer(checkpoint), None if native else parse_size(size)
    delegate(launch, device)
    from hmar_cli.console import console, warn
    from hmar_cli.data.sources import open_source
    from hmar_cli.evaluation.extractors import open_extractor
    from hmar_cli.evaluation.reports import publish
    from hmar_cli.report import pairs_grid, save_png

    given = open_source(images, size=wanted or source.recipe.data.size)
    if preset and given.length is not None and given.length < PRESET_COUNT:
        raise UserError(
            f"{images} has {given.length} images, and --preset tokenizer is of {PRESET_COUNT}",
            "give ImageNet's validation set, or leave out --preset and say --extractor inception",
        )
    place = join_processes(device)
    judge = open_extractor(extractor, place.device, extractor_weights) if extractor else None
    side = None if native else wanted or source.recipe.data.size
    frames = framed(source, given, side, crop or "adm", count=count, batch_size=batch_size, share=place.share)
    perceptual = open_lpips(lpips_weights) if lpips or lpips_weights else None
    found = measure(source, frames, judge, place.device, shown if picture else 0, perceptual)
    leave_processes()
    if place.rank:
        return
    if preset and found.count < PRESET_COUNT:
        raise UserError(
            f"{images} has {found.count} images that can be read, and --preset tokenizer is of {PRESET_COUNT}",
            frames.error or "give ImageNet's validation set",
        )
    report = make_report(source, frames, judge, found, preset or "", str(place.device))
    if picture:
        save_png(pairs_grid(found.pairs), picture)
        console.print(
            f"the first {len(found.pairs)} images above their reconstructions: {picture}", highlight=False
        )
    for line in warnings(frames, found):
        warn(line)
    publish(report, out, as_json=as_json, show=print_report)


def parse_size(text: str) -> list[int] | None:
    """Read "256" or "512x256" (width x height) as [height, width]; None for an empty text.

    Raises:
        UserError: another text.
    """
    if not text:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--size {text}: expected a side or WIDTHxHEIGHT in pixels", "such as 256 or 512x256")
    return [int(parts[-1]), int(parts[0])]


def open_lpips(weights: Path | None) -> "Lpips":
    """LPIPS with VGG16 from a file, or downloaded.

    Raises:
        UserError: no such file, other weights, or a download that failed.
    """
    from hmar_cli.tokenizers.losses import Lpips

    try:
        return Lpips(str(weights or "")).eval()
    except UserError as error:
        raise UserError(
            str(error), "--lpips-weights FILE takes `lpips.LPIPS(net='vgg').state_dict()`"
        ) from error


def framed(
    checkpoint: "Checkpoint", source: "ImageSource", size: "Side | None", crop: "Crop", **more: Any
) -> "FramedImages":
    """The images of a source at a size that the tokenizer takes; `more` is given to `FramedImages`.

    Raises:
        UserError: a size that its stride does not divide.
    """
    from hmar_cli.data.frames import FramedImages
    from hmar_cli.data.transforms import height_width

    stride = 2 ** (len(checkpoint.recipe.tokenizer.multipliers) - 1)
    height, width = (stride, stride) if size is None else height_width(size)
    if height % stride or width % stride:
        rows, columns = (max(side // stride, 1) * stride for side in (height, width))
        raise UserError(
            f"--size {width}x{height}: a token of this tokenizer is {stride} pixels wide, which must divide both",
            f"such as --size {columns}x{rows}",
        )
    return FramedImages(source, stride, None if size is None else (height, width), crop, **more)


def measure(
    checkpoint: "Checkpoint",
    frames: "FramedImages",
    judge: "Extractor | None",
    place: Any,
    shown: int,
    perceptual: "Lpips | None" = None,
) -> "Reconstructions":
    """Reconstruct the images, all processes together.

    Raises:
        UserError: no image that can be read, or one that is too small for the tokenizer's scales.
    """
    from hmar_cli.builders import load_tokenizer
    from hmar_cli.evaluation.reconstruction import evaluate_tokenizer

    codec = load_tokenizer(checkpoint.folder).to(place)
    try:
        perceptual = perceptual and perceptual.to(place)
        found = evaluate_tokenizer(codec, frames, judge, shown, perceptual)
    except ValueError as error:
        raise UserError(
            f"images of {frames.source.name} do not suit this tokenizer: {error}", "choose a larger --size"
        ) from error
    except FloatingPointError as error:
        raise UserError(f"{checkpoint.folder}: {error}", "its weights are broken") from error
    found.gather()
    frames.gather()
    if found.count < (2 if judge else 1):
        raise UserError(
            f"{frames.source.name} has {found.count} images that can be read"
            + (", and an rFID needs 2" if judge else ""),
            frames.error or "give more images",
        )
    return found


def make_report(
    checkpoint: "Checkpoint",
    frames: "FramedImages",
    judge: "Extractor | None",
    found: "Reconstructions",
    preset: str,
    device: str,
) -> "Report":
    """The numbers with what they depend on, and what is known of each scale."""
    import statistics

    from hmar_cli.evaluation.measures import metric_name
    from hmar_cli.evaluation.observing import set_digest
    from hmar_cli.evaluation.reports import Measured, Report, made_with
    from hmar_cli.tokenizers.blocks import hash_weights

    summary = found.summary()
    metrics = {}
    for key, name in (("psnr", "PSNR"), ("ssim", "SSIM"), ("l1", "L1"), ("lpips", "LPIPS[vgg]")):
        if summary[key] is not None:
            metrics[key] = Measured(name, summary[key], statistics.pstdev(getattr(found, key)))
    if judge is not None:
        metrics["rfid"] = Measured(f"r{metric_name('fid', judge, found.count)}", summary["rfid"])
    for key, name in (
        ("usage", "code usage"),
        ("latent_std", "latent std"),
        ("posterior_std", "posterior std"),
    ):
        if key in summary:
            metrics[key] = Measured(name, summary[key])
    sizes = {f"{width}x{height}": count for (height, width), count in sorted(frames.sizes.items())}
    settings = {
        "measures": "tokenizer",
        "images": {"count": found.count, "sha256": set_digest(found.digests), "sizes": sizes},
        "crop": frames.crop if frames.size else "none",
        "extractor": judge and {"name": judge.name, "fingerprint": judge.fingerprint},
        "lpips": found.perceptual and hash_weights(found.perceptual.state_dict(), b"lpips"),
    }
    subject = {
        "tokenizer": str(checkpoint.folder),
        "recipe": checkpoint.recipe.name,
        "kind": checkpoint.recipe.tokenizer.kind,
        "step": checkpoint.step,
        "fingerprint": checkpoint.tokenizer_hash,
        "images": frames.source.name,
        "unreadable": frames.unreadable,
    }
    about = {
        "preset": preset or None,
        "extractor": judge and judge.describe(),
        "scales": scale_rows(checkpoint, summary),
    }
    made = made_with(device, frames.share[1], found.count, found.seconds, batch_size=frames.batch_size)
    return Report(metrics, settings, subject, about, made)


def scale_rows(checkpoint: "Checkpoint", summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each scale its grid as in training, its tokens in all, the share of codes that occurs, their perplexity."""
    if "usage_per_scale" not in summary:
        return []
    columns = {
        "grid": map(list, checkpoint.recipe.scales.grids),
        "tokens": summary["tokens_per_scale"],
        "usage": summary["usage_per_scale"],
        "perplexity": summary["perplexity_per_scale"],
    }
    rows = enumerate(zip(*columns.values(), strict=True), start=1)
    return [{"scale": k, **dict(zip(columns, row, strict=True))} for k, row in rows]


def warnings(frames: "FramedImages", found: "Reconstructions") -> list[str]:
    """What a reader of the numbers has to know."""
    lines = []
    if frames.unreadable:
        lines.append(f"left out {frames.unreadable} images of {frames.source.name}; {frames.error}")
    if found.features >= found.count:
        lines.append(
            f"an rFID of {found.count} images says little: their covariance has {found.features} features a side"
        )
    if len(found.ssim) < found.count:
        lines.append(f"no SSIM of {found.count - len(found.ssim)} images that are smaller than its window")
    return lines


def print_report(report: "Report") -> None:
    """Print the numbers, and a row for each scale."""
    from hmar_cli.console import print_table
    from hmar_cli.evaluation.reports import as_text

    images = report.settings["images"]
    sizes = ", ".join(
        f"{size}" + f" ({n})" * (len(images["sizes"]) > 1) for size, n in images["sizes"].items()
    )
    about = f"{report.subject['recipe']}, {images['count']} images of {report.subject['images']}, {sizes}"
    print(about)
    width = max(len(number.name) for number in report.metrics.values())
    for key, number in report.metrics.items():
        unit = " dB" if key == "psnr" else ""
        print(f"{number.name:{width}}  {as_text(key, number)}{unit}")
    if not report.about["scales"]:
        return
    rows = (
        (
            str(row["scale"]),
            "x".join(map(str, reversed(row["grid"]))),
            str(row["tokens"]),
            f"{row['usage']:.1%}",
            f"{row['perplexity']:.1f}",
        )
        for row in report.about["scales"]
    )
    titles = ("scale", "grid in training", "tokens", "usage", "perplexity")
    print_table(dict.fromkeys(titles, "right"), rows)

"""`hmar eval prompts`: whether images show what their prompts say, by CLIP."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.commands import drawing
from hmar_cli.commands.flags import require_places
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.evaluation.prompts import ClipJudge, PromptScores
    from hmar_cli.evaluation.reports import Report

EXAMPLES = """
Measure whether images show what their prompts say: the CLIP score (Hessel et al. 2021).

IMAGES is what `hmar sample --prompt-file` wrote, or any other source with captions, such as real images for a number
to compare with; of several captions the first counts. An image's cosine is that of its vector and its prompt's by
CLIP. Printed are the mean of 100 max(cosine, 0), which papers call CLIP score, and the mean cosine, each with its
standard deviation over images. Both compare only where the model is the same.

`--clip` is any model of open_clip as TOWER/TAG, whose weights are downloaded once; where nothing can be downloaded,
`--clip-weights` takes their file (a state dict), and `--clip` still says which model it is.

**Examples**

- `hmar sample --checkpoint runs/himar-coco --prompt-file prompts.txt --out samples/coco`
- `hmar eval prompts samples/coco --out coco.json`
- `hmar eval prompts "coco:captions_val2014.json?images=val2014" --count 5000`
- `hmar eval prompts samples/coco --clip ViT-B-32/openai --clip-weights vit-b-32.safetensors --json`
"""

ClipName = Annotated[str, typer.Option(help="Model of open_clip: TOWER/TAG.")]
ClipWeights = Annotated[
    Path | None, typer.Option(help="File of its weights, where they cannot be downloaded.")
]
SHOWN = 16
"""First images that a grid shows."""


def register(app: typer.Typer) -> None:
    """Add the command to `hmar eval`."""
    app.command("prompts", help=EXAMPLES)(prompts)


def prompts(
    images: Annotated[str, typer.Argument(help="Images with prompts.", show_default=False)],
    clip: ClipName = "ViT-L-14/openai",
    clip_weights: ClipWeights = None,
    count: Annotated[int, typer.Option(min=0, help="Of the first images; 0 is all.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    out: Annotated[Path | None, typer.Option(help="JSON file for the report.")] = None,
    grid: Annotated[
        Path | None, typer.Option(help="PNG file of the first images. [default: beside --out]")
    ] = None,
    device: drawing.Device = "",
    launch: drawing.Launch = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure images; the help text is `EXAMPLES`."""
    from hmar_cli.launch import check_device, delegate, join_processes, leave_processes

    check_device(device)
    picture = require_places(out, grid)
    delegate(launch, device)
    from hmar_cli.commands.subjects import open_images
    from hmar_cli.console import warn
    from hmar_cli.evaluation.prompts import open_judge, require_prompts, score_images
    from hmar_cli.evaluation.reports import made_with, publish

    subject = open_images(images, None)
    require_prompts(subject.source)
    place = join_processes(device)
    judge = open_judge(clip, clip_weights, place.device)
    scores = score_images(
        judge,
        subject.source,
        count=count,
        batch_size=batch_size,
        shown=SHOWN if picture else 0,
        share=place.share,
    ).gather()
    leave_processes()
    if place.rank:
        return
    if not scores.cosines:
        raise UserError(f"{images} has no images that can be read", scores.error or "give others")
    if scores.unreadable:
        warn(f"left out {scores.unreadable} images; {scores.error}")
    if picture:
        save_grid(scores, picture)
    made = made_with(place.device, place.world, len(scores.cosines), scores.seconds, batch_size=batch_size)
    publish(make_report(judge, scores, subject.about, made), out, as_json=as_json, show=print_report)


def make_report(
    judge: "ClipJudge", scores: "PromptScores", subject: dict[str, Any], made: dict[str, Any]
) -> "Report":
    """The two numbers with what they depend on."""
    import hashlib

    from hmar_cli.evaluation.reports import Report

    digest = hashlib.sha256("\n".join(scores.prompts).encode()).hexdigest()
    settings = {
        "measures": "prompts",
        "clip": judge.describe(),
        "prompts": {"count": len(scores.cosines), "sha256": digest},
    }
    return Report(
        measured(judge, scores.cosines.values()),
        settings,
        {**subject, "unreadable": scores.unreadable},
        {"clip_weights": judge.file or None},
        made,
    )


def measured(judge: "ClipJudge", cosines: Any) -> dict[str, Any]:
    """CLIP score and mean cosine of some images, under the name of the model."""
    import statistics

    from hmar_cli.evaluation.prompts import clip_score, mean_cosine
    from hmar_cli.evaluation.reports import Measured

    values = list(cosines)
    return {
        "clip_score": Measured(
            f"CLIP score[{judge.name}]",
            clip_score(values),
            statistics.pstdev(100 * max(value, 0.0) for value in values),
        ),
        "clip_cosine": Measured(f"CLIP cosine[{judge.name}]", mean_cosine(values), statistics.pstdev(values)),
    }


def print_report(report: "Report") -> None:
    """Print the two numbers."""
    width = max(len(number.name) for number in report.metrics.values())
    print(f"{report.settings['prompts']['count']} images and prompts")
    for number in report.metrics.values():
        print(f"{number.name:{width}}  {number}")


def save_grid(scores: "PromptScores", target: Path) -> None:
    """Write the first images with their cosines and prompts below; larger ones are made smaller."""
    import numpy as np
    from PIL import ImageOps

    from hmar_cli.console import console
    from hmar_cli.report import image_grid, save_png

    side = min(256, max(max(image.size) for image, _, _ in scores.shown))
    tiles = [np.asarray(ImageOps.pad(image, (side, side), color="white")) for image, _, _ in scores.shown]
    captions = [f"{cosine:.3f} {prompt}" for _, prompt, cosine in scores.shown]
    save_png(image_grid(tiles, captions=captions), target)
    console.print(f"the first {len(scores.shown)} images: {target}", highlight=False)

"""`hmar eval compbench`: images for T2I-CompBench, and what can be measured of them here."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.commands import drawing
from hmar_cli.commands.eval_prompts import ClipWeights
from hmar_cli.commands.flags import given, require_places, with_flags, words
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.commands.drawing import Order
    from hmar_cli.commands.subjects import Subject
    from hmar_cli.evaluation.compbench import Category
    from hmar_cli.evaluation.prompts import ClipJudge, PromptScores
    from hmar_cli.evaluation.reports import Measured, Report
    from hmar_cli.launch import Place

EXAMPLES = """
Draw the images of T2I-CompBench (Huang et al. 2023) in the layout that its own evaluators read, and measure what can
be measured without them.

PROMPTS is its folder `examples/dataset`, or any other with files `CATEGORY_val.txt`, a prompt a line. Images of a
category lie in `OUT/CATEGORY/samples/PROMPT_INDEX.png`, ten of a prompt as in the paper, and `OUT/CATEGORY` is what
its evaluators take: BLIP-VQA for color, shape and texture, UniDet for spatial and numeracy, the 3-in-1 script for
complex. They need packages and weights of their own, and are not run here.

Here every category gets its mean cosine by CLIP; with `ViT-B-32/openai`, the default, that of `non_spatial` is the
benchmark's own number. `--clip none` leaves it out. Where all prompts of a category are those of `builtin:scenes`,
the judge of `hmar eval scenes` counts right colours, shapes and places.

A run that was interrupted goes on where it stopped.

**Examples**

- `hmar eval compbench runs/himar-coco T2I-CompBench/examples/dataset --out compbench --launch 8`
- `hmar eval compbench runs/himar-coco T2I-CompBench/examples/dataset --categories color,non_spatial --dry-run`
- `hmar eval scene-prompts 300 --split test > prompts/scenes_val.txt`
- `hmar eval compbench runs/himar-scenes prompts --clip none --per-prompt 4 --out compbench-scenes`
"""

NONE = "none"
"""`--clip` of no CLIP."""

DRAWN, REPORT = "drawn", "report.json"
"""Folder of the images as they are drawn, and the report beside it."""

SHOWN = 8
"""Images of a category that a grid shows, each of another prompt."""


def register(app: typer.Typer) -> None:
    """Add the command to `hmar eval`."""
    app.command("compbench", help=EXAMPLES)(compbench)


@with_flags
def compbench(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint or run of a text model.", show_default=False)
    ],
    prompts: Annotated[Path, typer.Argument(help="Folder of *_val.txt.", show_default=False)],
    sampler: drawing.MaskedSampler,
    loading: drawing.Drawing,
    out: Annotated[Path, typer.Option(help="Folder for images and report.")] = Path("compbench"),
    categories: Annotated[str, typer.Option(help="Such as color,spatial. [default: all files]")] = "",
    per_prompt: Annotated[int, typer.Option(min=1, help="Images of a prompt.")] = 10,
    limit: Annotated[int, typer.Option(min=0, help="Of each category's first prompts; 0 is all.")] = 0,
    clip: Annotated[str, typer.Option(help="Model of open_clip: TOWER/TAG, or none.")] = "ViT-B-32/openai",
    clip_weights: ClipWeights = None,
    grid: Annotated[
        Path | None, typer.Option(help="PNG of a row of images a category. [default: beside the report]")
    ] = None,
    batch_size: drawing.BatchSize = 0,
    device: drawing.Device = "",
    launch: drawing.Launch = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be drawn, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Draw and measure; the help text is `EXAMPLES`."""
    from hmar_cli.checkpoints.store import open_checkpoint
    from hmar_cli.evaluation.compbench import all_prompts, read_categories
    from hmar_cli.launch import check_device, delegate

    check_device(device)
    picture = require_places(out / REPORT, grid)
    if open_checkpoint(checkpoint).recipe.text is None:
        raise UserError(f"{checkpoint} reads no prompts", "give the checkpoint of a text model")
    groups = read_categories(prompts, words(categories), limit)
    order = drawing.place_order(
        checkpoint,
        given(sampler),
        loading,
        labels="",
        prompts=all_prompts(groups),
        count=per_prompt * len(all_prompts(groups)),
        batch_size=batch_size,
    )
    if dry_run and as_json:
        print(json.dumps(planned(order, groups, per_prompt, out), indent=2, ensure_ascii=False))
        return
    if dry_run:
        sizes = ", ".join(f"{group.name} ({len(group.prompts)})" for group in groups)
        drawing.print_plan(
            {**order.outline(), "of each": f"{per_prompt} images: {sizes}", "output": str(out)}
        )
        return
    delegate(launch, device)
    report = draw_and_measure(order, groups, per_prompt, out, picture, clip, clip_weights, device)
    if report is not None:
        from hmar_cli.console import console
        from hmar_cli.evaluation.reports import publish

        console.print(f"images: {out}/CATEGORY/samples", highlight=False)
        publish(report, out / REPORT, as_json=as_json, show=print_report)


def planned(order: "Order", groups: "list[Category]", per_prompt: int, out: Path) -> dict[str, Any]:
    """What would be drawn."""
    from dataclasses import asdict

    return {
        "checkpoint": str(order.checkpoint.folder),
        "categories": {group.name: len(group.prompts) for group in groups},
        "per_prompt": per_prompt,
        "images": order.count,
        "folders": [str(out / group.name / "samples") for group in groups],
        "sampling": {**asdict(order.settings), "seed": order.loading.seed},
    }


def draw_and_measure(
    order: "Order",
    groups: "list[Category]",
    per_prompt: int,
    out: Path,
    picture: Path | None,
    clip: str,
    clip_weights: Path | None,
    device: str,
) -> "Report | None":
    """Draw on all processes, compare with the prompts, and lay the images out; the report in the first process.

    The judge is loaded before anything is drawn, so that nothing is drawn in vain.
    """
    from hmar_cli.commands.subjects import drawn_images
    from hmar_cli.data.samples import read_samples
    from hmar_cli.evaluation.compbench import by_category, lay_out
    from hmar_cli.evaluation.prompts import PromptScores, open_judge, score_images
    from hmar_cli.launch import join_processes, leave_processes

    place = join_processes(device)
    judge = None if clip == NONE else open_judge(clip, clip_weights, place.device)
    with drawn_images(order, out / DRAWN, device) as subject:
        scores = PromptScores()
        if judge is not None:
            scores = score_images(judge, subject.source, count=order.count, share=place.share).gather()
    leave_processes()
    if place.rank:
        return None
    if scores.unreadable:
        raise UserError(
            f"an image of {out / DRAWN} cannot be read: {scores.error}", "delete it and run again"
        )
    _, paths = read_samples(out / DRAWN)
    images = by_category(paths[: order.count], groups, per_prompt)
    lay_out(images, groups, out)
    if picture:
        save_grid({name: paths[::per_prompt][:SHOWN] for name, paths in images.items()}, picture)
    return make_report(order, groups, per_prompt, judge, scores, images, subject, place)


def make_report(
    order: "Order",
    groups: "list[Category]",
    per_prompt: int,
    judge: "ClipJudge | None",
    scores: "PromptScores",
    images: dict[str, list[Path]],
    subject: "Subject",
    place: "Place",
) -> "Report":
    """What was measured of each category."""
    import hashlib

    from hmar_cli.commands.eval_prompts import measured
    from hmar_cli.evaluation.compbench import all_prompts, by_category
    from hmar_cli.evaluation.reports import Report, made_with

    metrics: dict[str, Measured] = {}
    if judge is not None:
        cosines = by_category([scores.cosines[i] for i in range(order.count)], groups, per_prompt)
        for name, values in cosines.items():
            metrics[f"{name}.clip_cosine"] = measured(judge, values)["clip_cosine"]
    for group in groups:
        metrics |= judged_scenes(group, images[group.name], per_prompt)
    text = "\n".join(all_prompts(groups))
    settings = {
        "measures": "compbench",
        "clip": judge and judge.describe(),
        "categories": {group.name: len(group.prompts) for group in groups},
        "per_prompt": per_prompt,
        "prompts_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    made = made_with(place.device, place.world, order.count, scores.seconds, drawing=subject.drawing)
    return Report(
        metrics, settings, dict(subject.about), {"clip_weights": (judge and judge.file) or None}, made
    )


def save_grid(rows: dict[str, list[Path]], target: Path) -> None:
    """Write a row of images for each category."""
    import numpy as np
    from PIL import Image

    from hmar_cli.console import console
    from hmar_cli.report import labelled_grid, save_png

    tiles = {
        name: [np.asarray(Image.open(path).convert("RGB")) for path in paths] for name, paths in rows.items()
    }
    save_png(labelled_grid(tiles), target)
    console.print(f"the first images of each category: {target}", highlight=False)


def judged_scenes(group: "Category", paths: list[Path], per_prompt: int) -> "dict[str, Measured]":
    """Shares of right colours, shapes and places, where all prompts are those of `builtin:scenes`; else nothing."""
    from hmar_cli.data.scenes import parse
    from hmar_cli.evaluation.reports import Measured
    from hmar_cli.evaluation.scenes import judge_images, summary

    try:
        for prompt in group.prompts:
            parse(prompt)
    except ValueError:
        return {}
    asked = [prompt for prompt in group.prompts for _ in range(per_prompt)]
    rows = summary(judge_images(paths, asked))
    return {
        f"{group.name}.{part}": Measured(
            f"{part} right", row["share"], more={"low": row["low"], "high": row["high"]}
        )
        for part, row in rows.items()
    }


def print_report(report: "Report") -> None:
    """Print the numbers of each category."""
    from hmar_cli.console import print_table
    from hmar_cli.evaluation.reports import as_text

    rows: list[tuple[str, ...]] = []
    for name, count in report.settings["categories"].items():
        head = (name, str(count), str(count * report.settings["per_prompt"]))
        own = [
            (number.name, as_text(key, number))
            for key, number in report.metrics.items()
            if key.startswith(f"{name}.")
        ]
        for place, cells in enumerate(own or [("nothing", "")]):
            rows.append((*(head if not place else ("", "", "")), *cells))
    print_table(
        {"category": "left", "prompts": "right", "images": "right", "measured here": "left", "": "right"},
        rows,
    )

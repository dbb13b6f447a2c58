"""`hmar eval`: measure what generated images show."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.commands import eval_edits
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.evaluation.compare import Comparison

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Measure what generated images show."
)

SCENES_HELP = """
Measure the share of images of `builtin:scenes` whose colours, shapes and places are as their prompts say.

FOLDER is what `hmar sample --prompt-file` wrote. The judge looks for two objects on a plain background; images with
fewer or more have nothing right. Shares come with their 95 % interval (Wilson's).

**Examples**

- `hmar eval scene-prompts 1000 --split test > prompts.txt`
- `hmar sample --checkpoint runs/himar-scenes --prompt-file prompts.txt --out samples/scenes`
- `hmar eval scenes samples/scenes`
- `hmar eval scenes samples/scenes --json`
"""

SAMPLES_HELP = """
Measure how far generated images are from real ones, by the features of a classifier that `hmar train` made.

FOLDER is what `hmar sample` wrote, or any other folder of images; `--reference` is spelled as any source of images.
All are scaled and centre-cropped to the size that the classifier was trained at.

`FD[classifier-cifar10]-10000` is the Fréchet distance of 10000 images (lower is better): FID's formula on the
features of that classifier. Such numbers compare with each other where the classifier, the reference and the number
of images are the same, and never with FID.

Accuracy is the share of samples that the classifier assigns to the class that they were drawn as, where it knows the
classes by name; that of the reference says how good it is on real images.

**Examples**

- `hmar train --recipe classifier-cifar10 --data cifar10-train.parquet`
- `hmar sample --checkpoint runs/hmar-cifar10 --count 10000 --out samples/hmar`
- `hmar eval samples samples/hmar --reference cifar10-test.parquet --extractor runs/classifier-cifar10`
- `hmar eval samples samples/hmar --reference "builtin:shapes?seed=1" --extractor runs/classifier-tiny --json`
"""

PROMPTS_HELP = """
Print prompts of `builtin:scenes`, one a line, for `hmar sample --prompt-file`.

None comes twice before all have come: there are 3000, of which the split "test" holds 300 that
`builtin:scenes?split=train` never shows.

**Examples**

- `hmar eval scene-prompts 1000 > prompts.txt`
- `hmar eval scene-prompts 300 --split test --seed 1`
"""


@app.command("samples", help=SAMPLES_HELP)
def samples(
    folder: Annotated[Path, typer.Argument(help="Folder of images.", show_default=False)],
    reference: Annotated[str, typer.Option(help="Source of real images.", show_default=False)],
    extractor: Annotated[Path, typer.Option(help="Checkpoint of a classifier.", show_default=False)],
    count: Annotated[int, typer.Option(min=0, help="Of the folder's first images; 0 is all.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda. [default: a GPU where there is one]")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every setting.")] = False,
) -> None:
    """Measure images; the help text is `SAMPLES_HELP`."""
    from hmar_cli.launch import check_device

    check_device(device)
    import torch

    from hmar_cli.builders import load_classifier
    from hmar_cli.console import console
    from hmar_cli.data.sources import open_source
    from hmar_cli.evaluation.compare import compare_images

    if not folder.is_dir():
        raise UserError(f"no folder {folder}", "give one that `hmar sample` wrote, or any with images")
    network, checkpoint = load_classifier(extractor)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    recipe = checkpoint.recipe
    found = compare_images(
        network.to(place),
        checkpoint.class_names,
        open_source(str(folder)),
        open_source(reference, size=recipe.data.size),
        size=recipe.data.size,
        count=count,
        batch_size=batch_size,
        workers=recipe.data.workers,
    )
    for each in (found.samples, found.reference):
        if each.unreadable:
            left_out = f"left out {each.unreadable} images of {each.source}; {each.error}"
            console.print(f"[yellow]warning:[/] {left_out}", highlight=False)
    name = f"FD[{recipe.name}]-{found.samples.statistics.count}"
    if not as_json:
        print_comparison(name, found)
        return
    about: dict[str, Any] = {
        "metric": name,
        **found.describe(),
        "extractor": {
            "checkpoint": str(checkpoint.folder),
            "recipe": recipe.name,
            "weights": "ema" if "ema" in checkpoint.weights else "model",
            "fingerprint": checkpoint.tokenizer_hash,
            "features": network.width,
            "size": recipe.data.size,
            "crop": "adm",
        },
        "batch_size": batch_size,
        "device": place,
    }
    print(json.dumps(about, indent=2, ensure_ascii=False))


def print_comparison(name: str, found: "Comparison") -> None:
    """Print a distance, and the accuracies that are known."""
    ours, real = found.samples, found.reference
    rows = [(name, f"{found.distance:.4g}", f"from {real.statistics.count} images of {real.source}")]
    for title, each in (("accuracy", ours), ("accuracy, reference", real)):
        if each.labelled:
            count = each.statistics.count
            share = f"{each.right / count:.1%}"
            rows.append((title, share, f"{each.right} of {count} images assigned to their class"))
    for title, value, text in rows:
        print(f"{title:{max(len(row[0]) for row in rows)}}  {value:>7}  {text}")


@app.command("scenes", help=SCENES_HELP)
def scenes(
    folder: Annotated[Path, typer.Argument(help="Folder that `hmar sample` wrote.", show_default=False)],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with what each wrong image shows.")
    ] = False,
) -> None:
    """Judge images; the help text is `SCENES_HELP`."""
    from hmar_cli.evaluation.scenes import judge_images, prompted_images, summary

    prompts, images = prompted_images(folder)
    verdicts = judge_images(images, prompts)
    rows = summary(verdicts)
    if as_json:
        wrong = [
            {"image": image.name, "prompt": prompts[i % len(prompts)], "seen": verdict.seen}
            for i, (image, verdict) in enumerate(zip(images, verdicts, strict=True))
            if not verdict.all
        ]
        print(json.dumps({"images": len(images), **rows, "wrong": wrong}, indent=2))
        return
    print(f"{'right':8} {'images':>6} {'share':>7}   95 % interval, of {len(images)} images")
    for name, row in rows.items():
        print(f"{name:8} {row['right']:6} {row['share']:7.1%}   {row['low']:.1%} to {row['high']:.1%}")


@app.command("scene-prompts", help=PROMPTS_HELP)
def scene_prompts(
    count: Annotated[int, typer.Argument(min=1, help="How many.", show_default=False)],
    seed: Annotated[int, typer.Option(min=0, help="Of their choice and order.")] = 0,
    split: Annotated[str, typer.Option(help="all, train or test.")] = "all",
) -> None:
    """Print prompts; the help text is `PROMPTS_HELP`."""
    from hmar_cli.data.scenes import SPLITS, prompts

    chosen = next((known for known in SPLITS if known == split), None)
    if chosen is None:
        raise UserError(f"--split {split}: expected {', '.join(SPLITS)}", "all is the default")
    print("\n".join(prompts(count, seed=seed, split=chosen)))


eval_edits.register(app)

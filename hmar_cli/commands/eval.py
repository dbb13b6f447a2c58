"""`hmar eval`: measure what generated images show."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hmar_cli.commands import (
    eval_compare,
    eval_compbench,
    eval_edits,
    eval_prompts,
    eval_samples,
    eval_tokenizer,
)
from hmar_cli.errors import UserError

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

PROMPTS_HELP = """
Print prompts of `builtin:scenes`, one a line, for `hmar sample --prompt-file`.

None comes twice before all have come: there are 3000, of which the split "test" holds 300 that
`builtin:scenes?split=train` never shows.

**Examples**

- `hmar eval scene-prompts 1000 > prompts.txt`
- `hmar eval scene-prompts 300 --split test --seed 1`
"""


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


for module in (eval_samples, eval_tokenizer, eval_prompts, eval_compbench, eval_compare, eval_edits):
    module.register(app)

"""`hmar edit`: draw a part of a picture anew, the room around it, or the whole of it as something else."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.commands import drawing
from hmar_cli.commands.flags import given, named, with_flags
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.checkpoints.store import Checkpoint
    from hmar_cli.pictures.request import Kind
    from hmar_cli.sampling.images import Conditions
    from hmar_cli.serving import Studio

EXAMPLES = """
Edit a picture, or every picture of a folder, with a model that was never trained to edit.

The picture may have any size and shape: the model works at its own size in a window around the region, and every
pixel outside the feathered region stays as it was, to the bit. For each picture the variations come as PNG files,
with a sheet that shows input, region, the tokenizer's reconstruction and variations side by side. Variation i
depends on the seed and i alone. A run that was interrupted goes on where it stopped.

**Examples**

- `hmar edit photo.jpg --checkpoint runs/hmar-masked --inpaint --box 100,80,220,200`
- `hmar edit photo.jpg --checkpoint runs/hmar-masked --inpaint --box 0,0,0.5,0.5 --box 0.8,0.8,1,1 --variations 8`
- `hmar edit photo.jpg --checkpoint runs/hmar-masked --inpaint --mask mask.png --invert --feather 12`
- `hmar edit photo.jpg --checkpoint runs/var-d16 --outpaint --left 64 --right 0.5`
- `hmar edit square.png --checkpoint runs/var-d16 --outpaint --canvas 1024x256`
- `hmar edit photo.jpg --checkpoint runs/var-d16 --class-edit --label tiger --box 0.2,0.2,0.8,0.8`
- `hmar edit photo.jpg --checkpoint runs/himar-b --class-edit --label 3 --strength 0.5`
- `hmar edit scene.png --checkpoint runs/himar-scenes --prompt "a red circle" --box 0.5,0,1,1`
- `hmar edit photos/ --checkpoint runs/hmar-masked --inpaint --mask masks/ --out edited --dry-run`
- `hmar edit --serve --checkpoint runs/hmar-masked`
"""

REGION_PANEL, OUTPAINT_PANEL, SERVE_PANEL = "The region", "Out-painting", "In the browser"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("edit", help=EXAMPLES)(edit)


@with_flags
def edit(
    ctx: typer.Context,
    checkpoint: drawing.Checkpoint,
    sampler: drawing.Sampler,
    loading: drawing.Loading,
    picture: Annotated[Path | None, typer.Argument(help="A picture, or a folder of pictures.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("edits"),
    inpaint: Annotated[bool, typer.Option("--inpaint", help="Draw a region anew.")] = False,
    outpaint: Annotated[bool, typer.Option("--outpaint", help="Draw the room around the picture.")] = False,
    class_edit: Annotated[
        bool,
        typer.Option("--class-edit", help="Draw the region, or the whole picture, as another class."),
    ] = False,
    label: Annotated[
        str, typer.Option("--label", "--labels", help="Class by index or name; of several, one a variation.")
    ] = "",
    prompt: drawing.Prompt = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=REGION_PANEL,
            help="x0,y0,x1,y1 in pixels, or with a decimal point in shares; may be repeated.",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=REGION_PANEL,
            help="Picture, white where to draw, or a folder with one of the same name for each picture.",
        ),
    ] = None,
    invert: Annotated[
        bool, typer.Option("--invert", rich_help_panel=REGION_PANEL, help="Draw all but the region.")
    ] = False,
    feather: Annotated[
        int | None,
        typer.Option(
            min=0,
            rich_help_panel=REGION_PANEL,
            help="Pixels outside the region over which it blends in. [default: 1/32 of the window]",
        ),
    ] = None,
    context: Annotated[
        float,
        typer.Option(
            min=0, rich_help_panel=REGION_PANEL, help="What the model sees around it, in its sides' lengths."
        ),
    ] = 0.5,
    erase: Annotated[
        bool | None,
        typer.Option(
            "--erase/--no-erase",
            rich_help_panel=REGION_PANEL,
            help="Hide what is there now from the model. [default: where all of it is drawn anew]",
        ),
    ] = None,
    left: Annotated[str, typer.Option(rich_help_panel=OUTPAINT_PANEL, help="Pixels, or a share.")] = "0",
    right: Annotated[str, typer.Option(rich_help_panel=OUTPAINT_PANEL, help="Pixels, or a share.")] = "0",
    top: Annotated[str, typer.Option(rich_help_panel=OUTPAINT_PANEL, help="Pixels, or a share.")] = "0",
    bottom: Annotated[str, typer.Option(rich_help_panel=OUTPAINT_PANEL, help="Pixels, or a share.")] = "0",
    canvas: Annotated[
        str,
        typer.Option(rich_help_panel=OUTPAINT_PANEL, help="WIDTHxHEIGHT, with the picture in its middle."),
    ] = "",
    window: Annotated[
        int,
        typer.Option(
            min=0,
            rich_help_panel=OUTPAINT_PANEL,
            help="Rows that a window covers; 0 is what the picture has.",
        ),
    ] = 0,
    overlap: Annotated[
        float,
        typer.Option(
            min=0.25, max=0.9, rich_help_panel=OUTPAINT_PANEL, help="Share of a window that is known."
        ),
    ] = 0.5,
    strength: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="How much of the region is new, above 0. [default: 1; 0.6 of whole pictures]",
        ),
    ] = None,
    keep_scales: Annotated[
        int | None,
        typer.Option(
            min=0,
            rich_help_panel=drawing.NEXT_SCALE_PANEL,
            help="First scales that stay whole. [default: 1; 0 of whole pictures]",
        ),
    ] = None,
    variations: Annotated[int, typer.Option(min=1, help="Of each picture.")] = 4,
    match_colours: Annotated[
        bool,
        typer.Option(
            " /--no-match-colours",
            help="Leave the tokenizer's shift of colours in.",
            show_default=False,
        ),
    ] = True,
    batch_size: drawing.BatchSize = 0,
    device: drawing.Device = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the region as the model would see it, and stop.")
    ] = False,
    as_json: drawing.AsJson = False,
    serve: Annotated[
        bool,
        typer.Option("--serve", rich_help_panel=SERVE_PANEL, help="Show a page to edit on, in the browser."),
    ] = False,
    host: Annotated[
        str,
        typer.Option(
            rich_help_panel=SERVE_PANEL, help="Address; others than this computer's are open to all."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, rich_help_panel=SERVE_PANEL, help="Its port.")
    ] = 7860,
) -> None:
    """Edit pictures; the help text is `EXAMPLES`."""
    asked, seed = given(sampler), loading.seed
    if serve:
        check_served(ctx)
        from hmar_cli import serving
        from hmar_cli.launch import end

        serving.check_installed()
        studio = open_studio(checkpoint, asked, loading, strength, keep_scales, device)
        first = serving.Start(strength or 1.0, variations, seed, feather, match_colours)
        serving.serve(studio, first, host, port)
        end(0)
    if picture is None:
        raise UserError(
            "no picture to edit", "give a picture or a folder, or --serve for a page in the browser"
        )
    from hmar_cli.pictures.request import edit_settings, erases, find_pictures, read_request

    kind = choose_kind(inpaint, outpaint, class_edit, bool(label), bool(prompt))
    request = read_request(
        kind, box or [], mask, invert, [left, top, right, bottom], canvas, context, window, overlap, feather
    )
    files = find_pictures(picture, out)
    from hmar_cli.checkpoints.store import open_checkpoint
    from hmar_cli.launch import choose_device

    place, source = choose_device(device), open_checkpoint(checkpoint)
    settings = drawing.resolve(source, asked)
    conditions = read_conditions(source, label, prompt or [], asked, loading.text_weights)
    chosen = edit_settings(source.recipe.tokenizer, request.whole, strength, keep_scales)
    if erase is None:
        erase = erases(chosen, request.whole)
    from hmar_cli.builders import load_model
    from hmar_cli.pictures.painter import ModelPainter
    from hmar_cli.pictures.run import Run

    model, codec, _ = load_model(checkpoint, loading.weights, loading.tokenizer)
    painter = ModelPainter(
        model.to(place), codec.to(place), conditions, settings, chosen, seed=seed, precision=loading.precision
    )
    about = {
        "checkpoint": str(source.folder),
        "weights": source.weights_file(loading.weights).stem,
        "tokenizer_hash": source.tokenizer_hash or codec.fingerprint(),
        **request.describe(),
        **asdict(chosen),
        "erase": erase,
        "match_colours": match_colours,
        "seed": seed,
        **painter.conditions.describe(),
        **{name: value for name, value in asdict(painter.settings).items() if name != "batch_size"},
    }
    run = Run(request, painter, about, out, variations, batch_size or source.recipe.sample.batch_size)
    report = run.look(files) if dry_run else run.edit(files)
    if as_json:
        print(json.dumps({**about, "pictures": report}, indent=2, ensure_ascii=False))


SERVED = {
    "checkpoint",
    "feather",
    "strength",
    "keep_scales",
    "variations",
    "match_colours",
    "device",
    "serve",
    "host",
    "port",
    *(each.name for group in (drawing.Sampler, drawing.Loading) for each in fields(group)),
}
"""Flags that go with --serve."""


def check_served(ctx: typer.Context) -> None:
    """Refuse what is chosen on the page.

    Raises:
        UserError: flags or a picture beside --serve that would have no effect.
    """
    if foreign := [flag for name, flag in named(ctx).items() if name not in SERVED]:
        raise UserError(f"--serve takes no {', '.join(foreign)}", "choose it on the page")


def open_studio(
    checkpoint: Path,
    asked: dict[str, Any],
    loading: drawing.Loading,
    strength: float | None,
    keep_scales: int | None,
    device: str,
) -> "Studio":
    """Load a model for the page.

    Raises:
        UserError: flags that cannot be followed, or a checkpoint of something else.
    """
    from hmar_cli.builders import load_model
    from hmar_cli.checkpoints.store import open_checkpoint
    from hmar_cli.launch import choose_device
    from hmar_cli.pictures.request import WHOLE_STRENGTH, edit_settings
    from hmar_cli.sampling.images import Prompts
    from hmar_cli.serving import Studio

    place, source = choose_device(device), open_checkpoint(checkpoint)
    settings = drawing.resolve(source, asked)
    chosen = edit_settings(source.recipe.tokenizer, False, strength, keep_scales)
    text = drawing.text_settings(source, loading.text_weights)
    prompts = drawing.conditions_for(text, [], []) if text else None
    assert prompts is None or isinstance(prompts, Prompts)
    model, codec, _ = load_model(checkpoint, loading.weights, loading.tokenizer)
    return Studio(
        name=checkpoint.resolve().name,
        model=model.to(place),
        tokenizer=codec.to(place),
        settings=settings,
        class_names=() if text else source.class_names,
        prompts=prompts,
        keep_scales=chosen.keep_scales,
        whole_strength=WHOLE_STRENGTH,
        together=4 if place.type == "cuda" else 1,  # alone the first comes sooner
        precision=loading.precision,
    )


def choose_kind(inpaint: bool, outpaint: bool, class_edit: bool, label: bool, prompt: bool) -> "Kind":
    """What is to be done; a prompt alone is an edit by prompt.

    Raises:
        UserError: not exactly one thing, or a class edit without a class.
    """
    asked: dict[Kind, bool] = {"inpaint": inpaint, "outpaint": outpaint, "class-edit": class_edit}
    kinds = [kind for kind, given in asked.items() if given]
    if not kinds and prompt:
        kinds = ["prompt-edit"]
    if len(kinds) != 1:
        what = "nothing to do" if not kinds else f"one edit at a time, not --{' and --'.join(kinds)}"
        raise UserError(what, "give --inpaint, --outpaint or --class-edit, or --prompt for a text model")
    if kinds == ["class-edit"] and not label:
        raise UserError("--class-edit needs a class", "give --label with a name or an index")
    return kinds[0]


def read_conditions(
    checkpoint: "Checkpoint",
    label: str,
    prompts: list[str],
    given: dict[str, Any],
    text_weights: Path | None,
) -> "Conditions | None":
    """What the variations are of; None where neither a class nor a text is asked for.

    Raises:
        UserError: a label for a text model, a text for a model of classes, a class that it does not know, or
            guidance towards nothing.
    """
    if checkpoint.recipe.text is not None and label:
        raise UserError(
            f"{checkpoint.folder} draws what a text says and has no classes", 'use --prompt "…" instead'
        )
    if checkpoint.recipe.text is None and prompts:
        raise UserError(
            f"{checkpoint.folder} draws classes and knows no text", "use --class-edit --label NAME"
        )
    guides = [f"--{name.replace('_', '-')}" for name in ("cfg", "pivot_cfg", "refine_cfg") if name in given]
    if guides and not (label or prompts):
        raise UserError(
            f"{guides[0]} guides towards a class or a text, and none is given", "give --label or --prompt"
        )
    text = drawing.text_settings(checkpoint, text_weights)
    if not (label or prompts):
        return None
    classes = [] if prompts else drawing.parse_labels(label, checkpoint.class_names)
    return drawing.conditions_for(text, classes, prompts)

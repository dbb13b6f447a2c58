"""`hmar edit`: draw a part of a picture anew, the room around it, or the whole of it as something else."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmar_cli.commands import drawing
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.checkpoints.store import Checkpoint
    from hmar_cli.pictures.editing import Plan
    from hmar_cli.pictures.painter import ModelPainter
    from hmar_cli.pictures.picture import Picture
    from hmar_cli.pictures.regions import Box, Length
    from hmar_cli.sampling.editing import EditSettings
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

WHOLE_STRENGTH = 0.6
"""Strength of an edit of the whole picture: with more, next to nothing of it would be left."""

KEPT = 1
"""Scales that are kept by default: what is erased continues its surroundings, and with it the mean colour."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""Files of a folder that are taken for pictures."""

SHOWN = 21
"""Most variations on a sheet."""

Kind = Literal["inpaint", "outpaint", "class-edit", "prompt-edit"]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("edit", help=EXAMPLES)(edit)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, of every picture."""

    kind: Kind
    boxes: "tuple[Box, ...]"
    mask: Path | None
    invert: bool
    margins: "tuple[Length, ...]"
    canvas: tuple[int, int] | None
    context: float
    window: int
    overlap: float
    feather: int | None

    @property
    def whole(self) -> bool:
        """Whether the whole picture is the region."""
        return self.kind != "outpaint" and not self.boxes and self.mask is None

    def describe(self) -> dict[str, Any]:
        """All that decides the region, for the record."""
        if self.kind == "outpaint":
            where: dict[str, Any] = {
                "margins": [f"{each.value:g}" + " of the side" * each.share for each in self.margins],
                "canvas": self.canvas,
                "window": self.window,
                "overlap": self.overlap,
            }
        else:
            where = {
                "boxes": [asdict(each) for each in self.boxes],
                "mask": None if self.mask is None else str(self.mask),
                "invert": self.invert,
                "context": self.context,
            }
        return {"edit": self.kind, **where}


def edit(
    ctx: typer.Context,
    checkpoint: drawing.Checkpoint,
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
    text_weights: drawing.TextWeights = None,
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
            help=f"How much of the region is new, above 0. [default: 1; {WHOLE_STRENGTH} of whole pictures]",
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
        bool, typer.Option(" /--no-match-colours", help="Leave the tokenizer's shift of colours in.")
    ] = True,
    seed: drawing.Seed = 0,
    cfg: drawing.Cfg = None,
    top_k: drawing.TopK = None,
    top_p: drawing.TopP = None,
    schedule: drawing.SchedulePasses = "recipe",
    refine_cfg: drawing.RefineCfg = None,
    steps: drawing.Steps = None,
    pivot_steps: drawing.PivotSteps = None,
    pivot_cfg: drawing.PivotCfg = None,
    cfg_schedule: drawing.CfgSchedule = None,
    pivot_cfg_schedule: drawing.PivotCfgSchedule = None,
    temperature: drawing.Temperature = None,
    head_sampler: drawing.HeadSampler = None,
    head_steps: drawing.HeadSteps = None,
    pivot_head_steps: drawing.PivotHeadSteps = None,
    batch_size: drawing.BatchSize = 0,
    weights: drawing.Weights = "",
    tokenizer: drawing.Tokenizer = None,
    device: drawing.Device = "",
    precision: drawing.Precision = "auto",
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
    given = drawing.given_settings(locals())
    if serve:
        check_served(ctx)
        from hmar_cli import serving

        serving.check_installed()
        studio = open_studio(
            checkpoint, given, strength, keep_scales, text_weights, weights, tokenizer, device, precision
        )
        first = serving.Start(strength or 1.0, variations, seed, feather, match_colours)
        serving.serve(studio, first, host, port)
        return
    if picture is None:
        raise UserError(
            "no picture to edit", "give a picture or a folder, or --serve for a page in the browser"
        )
    kind = choose_kind(inpaint, outpaint, class_edit, bool(label), bool(prompt))
    request = read_request(
        kind, box or [], mask, invert, [left, top, right, bottom], canvas, context, window, overlap, feather
    )
    files = find_pictures(picture, out)
    from hmar_cli.checkpoints.store import open_checkpoint
    from hmar_cli.launch import check_device

    check_device(device)
    source = open_checkpoint(checkpoint)
    conditioned = check_condition(source, kind, label, prompt or [], given)
    settings = drawing.resolve(source, given)
    chosen = edit_settings(source, request, strength, keep_scales)
    text = drawing.text_settings(source, text_weights)
    from hmar_cli.builders import load_model
    from hmar_cli.pictures.painter import ModelPainter, without_condition

    model, codec, _ = load_model(checkpoint, weights, tokenizer)
    place = _place(device)
    conditions = None
    if conditioned:
        classes = [] if prompt else drawing.parse_labels(label, source.class_names)
        conditions = drawing.conditions_for(text, classes, prompt or [])
    else:
        settings = without_condition(settings)
    painter = ModelPainter(
        model.to(place), codec.to(place), conditions, settings, chosen, seed=seed, precision=precision
    )
    if erase is None:
        erase = chosen.strength == 1 and chosen.keep_scales <= KEPT and not request.whole
    about = {
        "checkpoint": str(source.folder),
        "weights": weights or source.weights[-1],
        "tokenizer_hash": source.tokenizer_hash or codec.fingerprint(),
        **request.describe(),
        **asdict(chosen),
        "erase": erase,
        "match_colours": match_colours,
        "seed": seed,
        **(conditions.describe() if conditions else {}),
        **{name: value for name, value in asdict(settings).items() if name != "batch_size"},
    }
    run = Run(request, painter, about, out, variations, batch_size or source.recipe.sample.batch_size)
    report = run.look(files) if dry_run else run.edit(files)
    if as_json:
        print(json.dumps({**about, "pictures": report}, indent=2, ensure_ascii=False))


SERVED = {
    "checkpoint",
    "text_weights",
    "feather",
    "strength",
    "keep_scales",
    "variations",
    "match_colours",
    "seed",
}
SERVED |= {"weights", "tokenizer", "device", "precision", "serve", "host", "port", *drawing.SETTINGS}
"""Flags that go with --serve."""


def check_served(ctx: typer.Context) -> None:
    """Refuse what is chosen on the page.

    Raises:
        UserError: flags or a picture beside --serve that would have no effect.
    """
    given = [
        name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if foreign := [name for name in given if name not in SERVED]:
        what = ", ".join(
            "a picture" if name == "picture" else f"--{name.replace('_', '-')}" for name in foreign
        )
        raise UserError(f"--serve takes no {what.removeprefix('a ')}", "choose it on the page")


def open_studio(
    checkpoint: Path,
    given: dict[str, Any],
    strength: float | None,
    keep_scales: int | None,
    text_weights: Path | None,
    weights: str,
    tokenizer: Path | None,
    device: str,
    precision: str,
) -> "Studio":
    """Load a model for the page.

    Raises:
        UserError: flags that cannot be followed, or a checkpoint of something else.
    """
    from hmar_cli.builders import load_model
    from hmar_cli.checkpoints.store import open_checkpoint
    from hmar_cli.launch import check_device
    from hmar_cli.sampling.images import Prompts
    from hmar_cli.serving import Studio

    check_device(device)
    source = open_checkpoint(checkpoint)
    settings = drawing.resolve(source, given)
    region = read_request("inpaint", ["0.0,0.0,1.0,1.0"], None, False, ["0"] * 4, "", 0, 0, 0.5, None)
    chosen = edit_settings(source, region, strength, keep_scales)
    text = drawing.text_settings(source, text_weights)
    prompts = drawing.conditions_for(text, [], []) if text else None
    assert prompts is None or isinstance(prompts, Prompts)
    model, codec, _ = load_model(checkpoint, weights, tokenizer)
    place = _place(device)
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
        precision=precision,
    )


def choose_kind(inpaint: bool, outpaint: bool, class_edit: bool, label: bool, prompt: bool) -> Kind:
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


def read_request(
    kind: Kind,
    boxes: Sequence[str],
    mask: Path | None,
    invert: bool,
    margins: Sequence[str],
    canvas: str,
    context: float,
    window: int,
    overlap: float,
    feather: int | None,
) -> Request:
    """Read the flags that say where.

    Raises:
        UserError: flags of another edit, none where some are needed, or spellings that are none.
    """
    from hmar_cli.pictures.regions import parse_box, parse_canvas, parse_length

    names = ("--left", "--top", "--right", "--bottom")
    lengths = tuple(parse_length(text, name) for text, name in zip(margins, names, strict=True))
    region, room = bool(boxes or mask or invert), bool(canvas or any(each.value for each in lengths))
    if kind == "outpaint" and region:
        raise UserError(
            "--box, --mask and --invert are of a region within the picture",
            "leave them out of --outpaint, or --inpaint first",
        )
    if kind == "outpaint" and not room:
        raise UserError("--outpaint needs room", "give --left, --right, --top, --bottom or --canvas 768x512")
    if kind != "outpaint" and room:
        raise UserError("margins and --canvas are for --outpaint", f"leave them out of --{kind}")
    if not (boxes or mask) and (kind == "inpaint" or invert):
        raise UserError("the region is empty", "give --box 0.25,0.25,0.75,0.75 or --mask mask.png")
    if mask is not None and not mask.exists():
        raise UserError(f"{mask}: no such mask", "check the spelling of the path")
    return Request(
        kind=kind,
        boxes=tuple(parse_box(text) for text in boxes),
        mask=mask,
        invert=invert,
        margins=lengths,
        canvas=parse_canvas(canvas) if canvas else None,
        context=context,
        window=window,
        overlap=overlap,
        feather=feather,
    )


def find_pictures(path: Path, out: Path) -> dict[str, Path]:
    """The pictures of a path by the names of their results: the stem, with the suffix where two have the same.

    Raises:
        UserError: nothing there, no picture in a folder, or a folder that is to hold the results too.
    """
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: no such picture", "check the spelling of the path")
        return {path.stem: path}
    if path.resolve() == out.resolve():
        raise UserError(f"{out} holds the pictures to edit", "choose another --out")
    files = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES and each.is_file())
    if not files:
        raise UserError(f"{path} holds no picture", f"pictures end in {', '.join(sorted(SUFFIXES))}")
    stems = [each.stem for each in files]
    return {each.stem if stems.count(each.stem) == 1 else each.name: each for each in files}


def check_condition(
    checkpoint: "Checkpoint", kind: Kind, label: str, prompts: Sequence[str], given: dict[str, Any]
) -> bool:
    """See that the model knows what is asked for; whether anything is.

    Raises:
        UserError: a label for a text model, a text for a model of classes, or guidance towards nothing.
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
    return bool(label or prompts)


def edit_settings(
    checkpoint: "Checkpoint", request: Request, strength: float | None, keep_scales: int | None
) -> "EditSettings":
    """How much is drawn anew.

    Raises:
        UserError: values that cannot be followed.
    """
    from hmar_cli.sampling.editing import EditSettings
    from hmar_cli.settings import Msvq

    tokenizer = checkpoint.recipe.tokenizer
    most = len(tokenizer.scales) - 1 if isinstance(tokenizer, Msvq) else 0
    if keep_scales and not most:
        raise UserError(f"{checkpoint.folder} has no scales to keep", "use --strength instead")
    if keep_scales is not None and keep_scales > most:
        raise UserError(
            f"--keep-scales {keep_scales}: {checkpoint.folder} has {most + 1} scales", f"keep at most {most}"
        )
    if strength is None:
        strength = WHOLE_STRENGTH if request.whole and not keep_scales else 1.0
    if strength == 0:
        raise UserError("--strength 0 would change nothing", "give a number above 0, up to 1")
    if keep_scales is None:
        keep_scales = min(most, 0 if request.whole else KEPT)
    return EditSettings(strength=strength, keep_scales=keep_scales)


def _place(device: str) -> Any:
    import torch

    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def plan_for(request: Request, picture: "Picture", path: Path, model: tuple[int, int]) -> "Plan":
    """Plan an edit of one picture.

    Raises:
        UserError: a region that is empty or does not fit the picture.
    """
    import numpy as np

    from hmar_cli.pictures.editing import plan_region, plan_room
    from hmar_cli.pictures.regions import box_region, read_mask, room_around

    if request.kind == "outpaint":
        room = room_around(picture.size, request.margins, request.canvas)
        return plan_room(
            picture, room, model, height=request.window, overlap=request.overlap, feather=request.feather
        )
    if request.whole:
        region = np.full(picture.size, 255, np.uint8)
    else:
        region = box_region(picture.size, [each.pixels(picture.size, str(path)) for each in request.boxes])
    if request.mask is not None:
        region = np.maximum(region, read_mask(_mask_for(request.mask, path), picture.size))
    if request.invert:
        region = 255 - region
    return plan_region(picture, region, model, context=request.context, feather=request.feather)


def _mask_for(mask: Path, picture: Path) -> Path:
    """The mask of a picture: the one given, or of a folder the one with the picture's name."""
    if not mask.is_dir():
        return mask
    found = [
        each
        for each in sorted(mask.iterdir())
        if each.stem == picture.stem and each.suffix.lower() in SUFFIXES
    ]
    if len(found) != 1:
        raise UserError(
            f"{mask} holds {len(found)} masks for {picture.name}", f"it needs one, such as {picture.stem}.png"
        )
    return found[0]


@dataclass(frozen=True)
class Run:
    """A request that is carried out on pictures, with a model."""

    request: Request
    painter: "ModelPainter"
    about: dict[str, Any]
    out: Path
    variations: int
    together: int

    def edit(self, files: dict[str, Path]) -> list[dict[str, Any]]:
        """Edit every picture; of a folder those that cannot be edited are told at the end.

        Raises:
            UserError: pictures that could not be edited.
        """
        return self._each(files, self._edit_one)

    def look(self, files: dict[str, Path]) -> list[dict[str, Any]]:
        """Show what the model would see of every picture."""
        return self._each(files, self._look_at_one)

    def _each(self, files: dict[str, Path], do: Any) -> list[dict[str, Any]]:
        report, failed = [], []
        for name, path in files.items():
            try:
                report.append(do(name, path))
            except UserError as error:  # noqa: PERF203
                if len(files) == 1:
                    raise
                failed.append(f"{path.name}: {error}")
        if failed:
            raise UserError(
                f"{len(failed)} of {len(files)} pictures could not be edited; the others are in {self.out}",
                "mend or move them, then run the same command again",
                failed,
            )
        return report

    def _edit_one(self, name: str, path: Path) -> dict[str, Any]:
        from hmar_cli.console import console, progress
        from hmar_cli.pictures.editing import edit_picture, reconstruction, sheet
        from hmar_cli.pictures.picture import read_picture
        from hmar_cli.report import save_png

        plan = plan_for(self.request, read_picture(path), path, self.painter.size)
        self._claim(name, path, plan)
        targets = [self.out / f"{name}-{i:03d}.png" for i in range(self.variations)]
        missing = [i for i, target in enumerate(targets) if not target.exists()]
        if line := self.painter.select_attention(self.together):
            console.print(line, highlight=False)
        start = time.perf_counter()
        with progress(f"editing {path.name}", len(missing) * len(plan.windows), "windows") as bar:
            drawn = edit_picture(
                plan,
                self.painter,
                missing,
                match=self.about["match_colours"],
                erase=self.about["erase"],
                together=self.together,
                advance=bar.advance,
            )
            for i, result in drawn:
                save_png(result.image(), targets[i])
        seconds = time.perf_counter() - start
        shown = (read_picture(target) for target in targets[:SHOWN])
        overview = sheet(plan, reconstruction(plan, self.painter), shown)
        save_png(overview, self.out / f"{name}-sheet.png")
        console.print(f"{path.name}: {self.variations} variations, all in {self.out / f'{name}-sheet.png'}")
        return {
            **_described(plan, path),
            "variations": [str(target) for target in targets],
            "sheet": str(self.out / f"{name}-sheet.png"),
            "already_there": self.variations - len(missing),
            "seconds": round(seconds, 3),
        }

    def _claim(self, name: str, path: Path, plan: "Plan") -> None:
        """Record what makes the variations of a picture.

        Raises:
            UserError: variations of something else are there.
        """
        from hmar_cli.files import file_sha256, read_json, write_json

        target = self.out / f"{name}.json"
        record = {**self.about, **_described(plan, path), "sha256": file_sha256(path)}
        record = json.loads(json.dumps({**record, "precision": self.painter.precision}))
        if target.exists():
            found = read_json(target)
            found = found if isinstance(found, dict) else {}
            if keys := [key for key in {**found, **record} if found.get(key) != record.get(key)]:
                raise UserError(
                    f"{self.out} holds other edits of {path.name} ({', '.join(keys)})",
                    "choose another --out",
                    [f"{key}: {found.get(key)} there, {record.get(key)} now" for key in keys],
                )
        elif (self.out / f"{name}-000.png").exists():
            raise UserError(f"{self.out} holds pictures of an unknown origin", "choose another --out")
        write_json(target, record)

    def _look_at_one(self, name: str, path: Path) -> dict[str, Any]:
        from hmar_cli.console import console
        from hmar_cli.pictures.editing import preview, window_views
        from hmar_cli.pictures.picture import read_picture
        from hmar_cli.report import save_png

        plan = plan_for(self.request, read_picture(path), path, self.painter.size)
        views = window_views(plan, self.painter, erase=self.about["erase"])
        target = self.out / f"{name}-region.png"
        save_png(preview(plan, views), target)
        described = _described(plan, path)
        grids = [
            [
                {"name": grid.name, "tokens": grid.drawn.size, "drawn": int(grid.drawn.sum())}
                for grid in tokens
            ]
            for _, _, tokens in views
        ]
        console.print(
            f"{path.name}: {described['width']} x {described['height']}, region {described['region']:.1%}, "
            f"feather {plan.feather}; in {target}",
            highlight=False,
        )
        for place, tokens in zip(described["windows"], grids, strict=True):
            console.print(
                f"  window {place['width']} x {place['height']} at {place['left']}, {place['top']}:",
                highlight=False,
            )
            for grid in tokens:
                console.print(
                    f"    {grid['name']}: {grid['drawn']} of {grid['tokens']} tokens drawn", highlight=False
                )
        return {**described, "preview": str(target), "token_grids": grids}


def _described(plan: "Plan", path: Path) -> dict[str, Any]:
    """What a plan comes to, for records."""
    return {
        "picture": path.name,
        "height": plan.canvas.size[0],
        "width": plan.canvas.size[1],
        "region": round(float(plan.region.mean(dtype=float)) / 255, 6),
        "feather": plan.feather,
        "windows": [asdict(window) for window in plan.windows],
    }

"""What a person asks for of pictures: which ones, which edit, where; in the spellings of the command line."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hmar_cli.errors import UserError
from hmar_cli.pictures.editing import Plan, plan_region, plan_room
from hmar_cli.pictures.picture import Picture
from hmar_cli.pictures.regions import (
    Box,
    Length,
    box_region,
    parse_box,
    parse_canvas,
    parse_length,
    read_mask,
    room_around,
)
from hmar_cli.sampling.editing import EditSettings
from hmar_cli.settings import Kl, Msvq

WHOLE_STRENGTH = 0.6
"""Strength of an edit of the whole picture: with more, next to nothing of it would be left."""

KEPT = 1
"""Scales that are kept by default: what is erased continues its surroundings, and with it the mean colour."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""Files of a folder that are taken for pictures."""

Kind = Literal["inpaint", "outpaint", "class-edit", "prompt-edit"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, of every picture."""

    kind: Kind
    boxes: tuple[Box, ...]
    mask: Path | None
    invert: bool
    margins: tuple[Length, ...]
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
    names = ("--left", "--top", "--right", "--bottom")
    lengths = tuple(parse_length(text, name) for text, name in zip(margins, names, strict=True))
    region, room = bool(boxes or mask or invert), bool(canvas or any(each.value for each in lengths))
    if kind == "outpaint" and region:
        raise UserError(
            "--box, --mask and --invert are of a region within the picture",
            "leave them out of --outpaint, or --inpaint first",
        )
    if kind == "outpaint" and not room:
        raise UserError(
            "--outpaint needs room",
            "--left 0.25 --right 0.25 makes the picture 1.5 times as wide; --canvas WIDTHxHEIGHT is of the whole",
        )
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
        raise UserError(
            f"{path} holds no picture",
            f"subfolders are not looked into; pictures end in {', '.join(sorted(SUFFIXES))}",
        )
    stems = [each.stem for each in files]
    return {each.stem if stems.count(each.stem) == 1 else each.name: each for each in files}


def plan_for(request: Request, picture: Picture, path: Path, model: tuple[int, int]) -> Plan:
    """Plan an edit of one picture.

    Raises:
        UserError: a region that is empty or does not fit the picture.
    """
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


def edit_settings(
    tokenizer: Msvq | Kl, whole: bool, strength: float | None, keep_scales: int | None
) -> EditSettings:
    """How much is drawn anew.

    Args:
        tokenizer: the model's.
        whole: the whole picture is the region.
        strength: None is 1, and less of whole pictures.
        keep_scales: None is what suits the region.

    Raises:
        UserError: values that cannot be followed.
    """
    most = len(tokenizer.scales) - 1 if isinstance(tokenizer, Msvq) else 0
    if keep_scales and not most:
        raise UserError("a model without scales has no scales to keep", "use --strength instead")
    if keep_scales is not None and keep_scales > most:
        raise UserError(
            f"--keep-scales {keep_scales}: the model has {most + 1} scales", f"keep at most {most}"
        )
    if strength is None:
        strength = WHOLE_STRENGTH if whole and not keep_scales else 1.0
    if strength == 0:
        raise UserError("--strength 0 would change nothing", "give a number above 0, up to 1")
    if keep_scales is None:
        keep_scales = min(most, 0 if whole else KEPT)
    return EditSettings(strength=strength, keep_scales=keep_scales)


def erases(edit: EditSettings, whole: bool) -> bool:
    """Whether what is in the region is hidden from the model by default: where all of it is drawn anew."""
    return edit.strength == 1 and edit.keep_scales <= KEPT and not whole

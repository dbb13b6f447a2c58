"""What of a picture is drawn anew: boxes, masks, the room around it; and the weights that blend it in.

A region is [H, W] uint8: 255 is drawn anew, 0 kept, between them a mixture. The feather grows outwards: weights are
255 (or the mask's own) inside the region, fall to 0 within `feather` pixels outside it, and are exactly 0 from there
on. There the result is the picture, to the bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from hmar_cli.console import warn
from hmar_cli.errors import UserError
from hmar_cli.pictures.picture import LIMIT, Pixels, check_size, read_image

BOX_HINT = "give x0,y0,x1,y1 in pixels (16,16,48,48), or in shares of the sides (0.25,0.25,0.75,0.75)"


@dataclass(frozen=True)
class Box:
    """A rectangle: its left, top, right and bottom edges.

    Attributes:
        edges: x0, y0, x1, y1.
        shares: whether they are shares of the picture's width and height; else pixels.
    """

    edges: tuple[float, float, float, float]
    shares: bool

    def pixels(self, size: tuple[int, int], name: str = "the picture") -> tuple[int, int, int, int]:
        """Left, top, right and bottom in a picture of `size` (H, W); a share of a pixel counts as the whole.

        Raises:
            UserError: the box reaches out of the picture.
        """
        height, width = size
        x0, y0, x1, y1 = self.edges
        if self.shares:
            x0, y0, x1, y1 = x0 * width, y0 * height, x1 * width, y1 * height
        near = 1e-6  # 0.07 of 100 is 7, whatever floating point makes of it
        left, top = math.floor(x0 + near), math.floor(y0 + near)
        right, bottom = math.ceil(x1 - near), math.ceil(y1 - near)
        if left < 0 or top < 0 or right > width or bottom > height:
            raise UserError(
                f"the box {left},{top},{right},{bottom} reaches out of {name}, which has {width} x {height} pixels",
                "`--outpaint` draws what lies outside; shares such as 0.25,0.25,0.75,0.75 fit every picture",
            )
        return left, top, right, bottom


def parse_box(text: str) -> Box:
    """Read "x0,y0,x1,y1": with a decimal point anywhere shares of the sides, else pixels.

    Raises:
        UserError: anything else, or a box without area.
    """
    try:
        parts = [part.strip() for part in text.split(",")]
        x0, y0, x1, y1 = (float(part) for part in parts)
    except ValueError as error:
        raise UserError(f"--box {text}: expected four numbers", BOX_HINT) from error
    if not all(math.isfinite(v) for v in (x0, y0, x1, y1)):
        raise UserError(f"--box {text}: expected finite numbers", BOX_HINT)
    if x0 >= x1 or y0 >= y1:
        raise UserError(f"--box {text}: the region is empty, its edges are not in order", BOX_HINT)
    shares = any("." in part for part in parts)
    if shares and (min(x0, y0) < 0 or max(x1, y1) > 1):
        raise UserError(f"--box {text}: shares of the sides lie between 0 and 1", BOX_HINT)
    return Box((x0, y0, x1, y1), shares)


class Length(NamedTuple):
    """A margin: pixels, or a share of the picture's side."""

    value: float
    share: bool

    def pixels(self, side: int) -> int:
        """The margin beside a picture whose side is `side`."""
        return round(self.value * side) if self.share else int(self.value)


NOTHING = Length(0, False)


def parse_length(text: str, flag: str) -> Length:
    """Read a margin: "64" pixels, or with a decimal point a share of the picture's side, "0.5".

    Raises:
        UserError: anything else.
    """
    try:
        value, share = (float(text), True) if "." in text else (float(int(text)), False)
        if not 0 <= value < LIMIT:
            raise ValueError
    except ValueError as error:
        raise UserError(
            f"{flag} {text}: expected pixels or a share", "give 64, or 0.5 for half the picture's side"
        ) from error
    return Length(value, share)


def parse_canvas(text: str) -> tuple[int, int]:
    """Read "WIDTHxHEIGHT" in pixels as (H, W).

    Raises:
        UserError: anything else.
    """
    width, _, height = text.lower().replace("\u00d7", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"--canvas {text}: expected a size in pixels", "give WIDTHxHEIGHT, as 768x512")
    return int(height), int(width)


@dataclass(frozen=True)
class Room:
    """The canvas around a picture.

    Attributes:
        size: (H, W) of the canvas.
        top: row of the picture's first row.
        left: column of its first column.
    """

    size: tuple[int, int]
    top: int
    left: int


def room_around(
    size: tuple[int, int], margins: Sequence[Length] = (NOTHING,) * 4, canvas: tuple[int, int] | None = None
) -> Room:
    """Lay out a canvas around a picture.

    Args:
        size: (H, W) of the picture.
        margins: left, top, right, bottom.
        canvas: (H, W); the picture lies in its middle, or where margins put it.

    Raises:
        UserError: no room, a canvas smaller than the picture, or one that is too large.
    """
    height, width = size
    left, top, right, bottom = (
        margin.pixels(side) for margin, side in zip(margins, (width, height, width, height), strict=True)
    )
    if canvas is None:
        canvas = top + height + bottom, left + width + right
    else:
        spare_rows, spare_columns = canvas[0] - height, canvas[1] - width
        if spare_rows < 0 or spare_columns < 0:
            raise UserError(
                f"--canvas {canvas[1]}x{canvas[0]} is smaller than the picture, {width} x {height}",
                "out-painting adds to a picture; cut it before, or give a larger canvas",
            )
        left = left or (spare_columns - right if right else spare_columns // 2)
        top = top or (spare_rows - bottom if bottom else spare_rows // 2)
        fits = 0 <= left <= spare_columns - right and 0 <= top <= spare_rows - bottom
        if not fits:
            raise UserError(
                f"the margins leave the canvas of {canvas[1]} x {canvas[0]} pixels",
                "give a canvas, or margins, or margins that fit the canvas",
            )
    if canvas == size:
        raise UserError(
            f"the region is empty: the picture fills the canvas of {width} x {height}",
            f"give --left 64, or a larger one, such as --canvas {width * 3 // 2 or 2}x{height}",
        )
    check_size(*canvas, "the canvas")
    return Room(canvas, top, left)


def box_region(size: tuple[int, int], boxes: Sequence[tuple[int, int, int, int]]) -> Pixels:
    """A region of boxes (left, top, right, bottom)."""
    region = np.zeros(size, np.uint8)
    for left, top, right, bottom in boxes:
        region[top:bottom, left:right] = 255
    return region


def room_region(room: Room, size: tuple[int, int]) -> Pixels:
    """A region of all of a canvas but the picture of `size` on it."""
    region = np.full(room.size, 255, np.uint8)
    region[room.top : room.top + size[0], room.left : room.left + size[1]] = 0
    return region


def read_mask(path: Path, size: tuple[int, int]) -> Pixels:
    """Read a mask: white is drawn anew, black and transparent is kept, grey is a mixture. Warn of photographs.

    Args:
        path: any picture; colours count by their brightness.
        size: (H, W) that it must have.

    Raises:
        UserError: unreadable, or of another size.
    """
    image = read_image(path)
    if (image.height, image.width) != size:
        raise UserError(
            f"{path}: the mask has {image.width} x {image.height} pixels, the picture {size[1]} x {size[0]}",
            "a mask has the size of the upright picture",
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
        mask: Pixels = (deep >> 8).astype(np.uint8)
        _warn_of_photographs(path, Image.fromarray(mask))
        return mask
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    _warn_of_photographs(path, image)
    brightness: Pixels = np.asarray(image.convert("L"))
    return brightness


def _warn_of_photographs(path: Path, mask: Image.Image) -> None:
    """Warn where a mask looks like a photograph: coloured, or mostly neither black nor white.

    A sample of its pixels is looked at. JPEG's small errors do not count.
    """
    sample = mask.resize((min(mask.width, 512), min(mask.height, 512)), Image.Resampling.NEAREST)
    pixels = np.asarray(sample.convert("RGB")).astype(np.int16)
    levels = np.asarray(sample.convert("L"))
    coloured = float((np.ptp(pixels, axis=2) > 24).mean())
    between = float(((levels > 24) & (levels < 231)).mean())
    if coloured > 0.01:
        what = f"{coloured:.0%} of it has colours, which count by their brightness"
    elif between > 0.5:
        what = f"{between:.0%} of it is neither black nor white, and mixes the new with the old"
    else:
        return
    warn(f"{path} does not look like a mask, white where to draw and black elsewhere: {what}")


def bounds(region: Pixels) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is not 0.

    Raises:
        UserError: nothing is.
    """
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if not len(rows):
        raise UserError(
            "the region is empty", "white parts of a mask are drawn anew; --invert turns it round"
        )
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def grow(region: Pixels, radius: int) -> Pixels:
    """The largest value within a square of `radius` pixels around each pixel."""
    for axis in (0, 1):
        reach = min(radius, region.shape[axis])  # what lies beyond is nothing
        width = 2 * reach + 1
        padding = [(reach, reach) if each == axis else (0, 0) for each in (0, 1)]
        values = np.moveaxis(np.pad(region, padding), axis, 0)  # the axis comes first
        span = 1  # values[i] is the largest of `span` from i on
        while 2 * span <= width:
            values, span = np.maximum(values[:-span], values[span:]), 2 * span
        if rest := width - span:
            values = np.maximum(values[:-rest], values[rest:])
        region = np.moveaxis(values, 0, axis)
    grown: Pixels = np.ascontiguousarray(region)
    return grown


def feathered(region: Pixels, feather: int) -> Pixels:
    """Weights of what is drawn, [H, W] uint8: the region's own inside, falling to 0 within `feather` pixels outside.

    Raises:
        ValueError: a negative feather.
    """
    if feather < 0:
        raise ValueError(f"expected a feather of 0 or more pixels, got {feather}")
    if not feather or not region.any():
        same: Pixels = region.copy()
        return same
    left, top, right, bottom = bounds(region)
    part = np.s_[
        max(0, top - feather) : bottom + feather, max(0, left - feather) : right + feather
    ]  # nothing changes outside
    inner = feather // 2
    blurred = Image.fromarray(grow(region[part], inner)).filter(ImageFilter.BoxBlur(feather - inner))
    weight = np.zeros_like(region)
    weight[part] = np.maximum(region[part], np.asarray(blurred))
    return weight

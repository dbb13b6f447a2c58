"""Where a model looks: windows of its own shape on a picture of any size, around a region, or a walk outwards.

Letters: H W the picture's rows and columns; h w the model's.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from hmar_cli.errors import UserError
from hmar_cli.pictures.compositing import extend
from hmar_cli.pictures.picture import Picture, Pixels
from hmar_cli.pictures.regions import bounds

CONTEXT = 0.5
"""Share of a region's sides that a window shows around it, on each side, where there is room."""

MOST = 1 << 14
"""Most windows of a walk."""

RIM = 16
"""A window's rim is this part of its sides."""

LEAST_CONTEXT = 0.125
"""The same where the picture is too small for more."""

CELLS = 128
"""Cells along a picture's longer side by which parts of a region are told apart."""

PARTS = 64
"""A region of more parts than this is taken for one."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels; the ends are excluded."""


@dataclass(frozen=True)
class Window:
    """A rectangle of a picture that a model draws in; it may reach out of the picture."""

    top: int
    left: int
    height: int
    width: int

    def inside(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of a picture of `size` (H, W) that lie in the window."""
        return (
            slice(max(0, self.top), max(0, min(size[0], self.top + self.height))),
            slice(max(0, self.left), max(0, min(size[1], self.left + self.width))),
        )

    def settled(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """The same without the rim, which a walk draws again where the canvas goes on.

        A tokenizer's decoder is at its worst there: its convolutions see nothing beyond. Windows that overlap by a
        quarter or more cover a canvas without their rims, too.
        """
        rows, columns = self.inside(size)
        down, along = self.height // RIM, self.width // RIM
        return (
            slice(
                rows.start + (down if rows.start > 0 else 0), rows.stop - (down if rows.stop < size[0] else 0)
            ),
            slice(
                columns.start + (along if columns.start > 0 else 0),
                columns.stop - (along if columns.stop < size[1] else 0),
            ),
        )

    def padding(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows before and after, and columns before and after, by which the window reaches out of a picture."""
        rows, columns = self.inside(size)
        return (
            (rows.start - self.top, self.top + self.height - rows.stop),
            (columns.start - self.left, self.left + self.width - columns.stop),
        )


def windows_around(region: Pixels, model: tuple[int, int], context: float = CONTEXT) -> tuple[Window, ...]:
    """A window for each part of a region; parts of which one would lie in the other's window share theirs.

    Args:
        region: [H, W] uint8.
        model: (h, w) of the model's images.
        context: see `window_around`.

    Raises:
        UserError: an empty region.
    """
    boxes = parts(region)
    while True:
        windows = [window_around(box, region.shape, model, context) for box in boxes]
        pairs = itertools.permutations(range(len(boxes)), 2)
        meeting = next(((i, j) for i, j in pairs if _meet(windows[i], boxes[j])), None)
        if meeting is None:
            return tuple(windows)
        one, other = (boxes[i] for i in meeting)
        boxes = [box for i, box in enumerate(boxes) if i not in meeting]
        boxes.append((*map(min, one[:2], other[:2]), *map(max, one[2:], other[2:])))  # type: ignore[arg-type]


def _meet(window: Window, box: Box) -> bool:
    """Whether a window and a box have pixels in common."""
    left, top, right, bottom = box
    return (
        window.top < bottom
        and top < window.top + window.height
        and window.left < right
        and left < window.left + window.width
    )


def parts(region: Pixels) -> list[Box]:
    """Boxes around the parts of a region [H, W] that lie apart, told by cells of 1/`CELLS` of its longer side.

    Raises:
        UserError: an empty region.
    """
    whole = bounds(region)
    cell = math.ceil(max(region.shape) / CELLS)
    down, along = range(0, region.shape[0], cell), range(0, region.shape[1], cell)
    filled = np.maximum.reduceat(np.maximum.reduceat(region, down, axis=0), along, axis=1) > 0
    left_over = set(zip(*(each.tolist() for each in np.nonzero(filled)), strict=True))
    boxes = []
    while left_over:
        reached = [left_over.pop()]
        for row, column in reached:
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left_over
            left_over -= near
            reached += near
        rows, columns = zip(*reached, strict=True)
        top, left = min(rows) * cell, min(columns) * cell
        inner = bounds(region[top : (max(rows) + 1) * cell, left : (max(columns) + 1) * cell])
        boxes.append((left + inner[0], top + inner[1], left + inner[2], top + inner[3]))
    return boxes if len(boxes) <= PARTS else [whole]


def window_around(
    box: Box,
    size: tuple[int, int],
    model: tuple[int, int],
    context: float = CONTEXT,
) -> Window:
    """The smallest window of the model's shape around a region and its context.

    It shows `context` times the region's sides on each side of it, and is no smaller than the model's own images. It
    lies inside the picture if at least `LEAST_CONTEXT` fits in there; else it reaches out.

    Args:
        box: left, top, right and bottom of the region.
        size: (H, W) of the picture.
        model: (h, w) of the model's images.
        context: 0 or more.
    """
    left, top, right, bottom = box
    need = max((bottom - top) / model[0], (right - left) / model[1])  # scales: picture pixels to a model's
    fit, cover = (f(size[0] / model[0], size[1] / model[1]) for f in (min, max))
    want = max(1.0, (1 + 2 * context) * need)
    least = min((1 + 2 * min(context, LEAST_CONTEXT)) * need, max(need, cover))
    scale = min(want, fit) if least <= fit else least
    height = max(math.ceil(scale * model[0] - 1e-9), bottom - top)
    width = max(math.ceil(scale * model[1] - 1e-9), right - left)
    return Window(_place(top + bottom, height, size[0]), _place(left + right, width, size[1]), height, width)


def _place(twice_centre: int, length: int, room: int) -> int:
    """Where a stretch around a centre starts, within the room if it is large enough, else around it."""
    if length > room:
        return -((length - room) // 2)
    return min(max((twice_centre - length) // 2, 0), room - length)


def walk(
    size: tuple[int, int], inner: tuple[int, int, int, int], window: tuple[int, int], overlap: float = 0.5
) -> list[Window]:
    """Overlapping windows from a picture to the edges of its canvas, each next to what came before it.

    Every window but those that show the picture overlaps an earlier one by at least `overlap` of its side.

    Args:
        size: (H, W) of the canvas.
        inner: left, top, right and bottom of the picture on it.
        window: (height, width) of the windows, in pixels of the canvas, each at least 2.
        overlap: in [0.25, 1).

    Returns:
        Windows that cover the canvas, those nearest to the picture first.

    Raises:
        ValueError: an overlap out of range, or windows too small to overlap.
        UserError: more than `MOST` windows.
    """
    if not 0.25 <= overlap < 1:
        raise ValueError(f"expected an overlap of 0.25 or more and below 1, got {overlap}")
    if min(window) < 2:
        raise ValueError(f"expected windows of at least 2 pixels, got {window}")
    left, top, right, bottom = inner
    rows = _stops(size[0], top, bottom, window[0], overlap)
    columns = _stops(size[1], left, right, window[1], overlap)
    if (count := len(rows) * len(columns)) > MOST:
        raise UserError(
            f"the canvas takes {count} windows of {window[1]} x {window[0]} pixels, more than {MOST}",
            "give a larger --window, a smaller canvas, or enlarge the picture before",
        )
    windows = [Window(row, column, *window) for row, column in itertools.product(rows, columns)]

    def distance(each: Window) -> tuple[float, int, int]:
        down = (2 * each.top + each.height - top - bottom) / window[0]
        along = (2 * each.left + each.width - left - right) / window[1]
        return math.hypot(down, along), each.top, each.left

    return sorted(windows, key=distance)


def _stops(room: int, start: int, stop: int, length: int, overlap: float) -> list[int]:
    """Places of windows along one side of a canvas of `room` pixels, whose [start, stop) is the picture."""
    if length >= room:
        return [-((length - room) // 2)]
    step = max(1, int(length * (1 - overlap)))
    last = room - length
    first_right, first_left = min(stop - length + step, last), max(start - step, 0)
    stops = {*range(first_right, last, step), *range(first_left, 0, -step)}
    stops |= {max(0, min(last, place)) for place in range(first_left, first_right, step)}  # over the picture
    stops |= {0, last}
    return sorted(place for place in stops if 0 <= place <= last)


@dataclass(frozen=True)
class View:
    """What a model sees in a window.

    Attributes:
        image: [h, w, 3] uint8.
        region: [h, w] float32 in [0, 1], 1 where all is drawn anew; also whatever lies outside the picture.
    """

    image: Pixels
    region: npt.NDArray[np.float32]


def view_region(region: Pixels, window: Window, model: tuple[int, int]) -> npt.NDArray[np.float32]:
    """The region in a window at the model's size: averages over areas, [h, w] in [0, 1]; 1 outside the picture."""
    size = region.shape[0], region.shape[1]
    part = np.pad(region[window.inside(size)], window.padding(size), constant_values=255)
    means = _resized(part.astype(np.float32), model, Image.Resampling.BOX)
    shares: npt.NDArray[np.float32] = (means / np.float32(255)).round(5)  # 1 where all is, for all rounding
    return shares


def without_slivers(region: npt.NDArray[np.float32], token: int) -> npt.NDArray[np.float32]:
    """A region without the tokens of which only a small part lies in it, for the model.

    A token is drawn whole, and what it stands for outside the region is lost to the model: drawn for a sliver's sake,
    it takes away what the rest should agree with. Tokens stay with at least half of the largest share that any has.

    Args:
        region: [h, w], a multiple of `token` each.
        token: pixels along a token's side.

    Returns:
        [h, w], zeros in the tokens that are left out.
    """
    rows, columns = region.shape[0] // token, region.shape[1] // token
    shares = region.reshape(rows, token, columns, token).mean(axis=(1, 3))  # of each token
    enough = (shares >= shares.max() / 2).repeat(token, axis=0).repeat(token, axis=1)
    return np.where(enough, region, np.float32(0))


def view_image(
    picture: Picture, window: Window, model: tuple[int, int], unknown: npt.NDArray[np.bool_]
) -> Pixels:
    """The picture in a window at the model's size, [h, w, 3]; what is unknown continues its surroundings.

    Args:
        picture: the picture.
        window: the window.
        model: (h, w).
        unknown: [h, w], where the picture's pixels are not used.
    """
    part = picture.seen(*window.inside(picture.size))
    padded: Pixels = np.pad(part, (*window.padding(picture.size), (0, 0)), mode="edge")
    image: Any = _resized(padded, model, Image.Resampling.LANCZOS)
    result: Pixels = image
    if unknown.any() and not unknown.all():
        filled = extend(image.astype(np.float32), ~unknown)
        result = filled.round().clip(0, 255).astype(np.uint8)
    return result


def _resized(values: Any, size: tuple[int, int], filter: Image.Resampling) -> Any:
    """Resize [H, W] or [H, W, 3] to `size`, antialiased; the same numbers where it has that size."""
    if values.shape[:2] == size:
        return values
    return np.asarray(Image.fromarray(values).resize((size[1], size[0]), filter))

"""Editing a picture of any size: a plan of windows, a model that draws in them, and what people look at.

Letters: H W the canvas's rows and columns; h w the model's; B variations that are drawn together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from hmar_cli.pictures.compositing import fit, match_colours, paste
from hmar_cli.pictures.picture import LIMIT, Picture, Pixels, check_size
from hmar_cli.pictures.regions import Room, bounds, feathered, room_region
from hmar_cli.pictures.windows import (
    CONTEXT,
    Window,
    view_image,
    view_region,
    walk,
    windows_around,
    without_slivers,
)
from hmar_cli.report import image_grid

Floats = npt.NDArray[np.float32]

TILE = 320
"""Longest side of a picture on a sheet, in pixels, of a wide one three times that; smaller ones are enlarged."""

CLOSE = 768
"""Longest side of a window on a sheet: up to this it is shown pixel for pixel, or enlarged to about a `TILE`."""

WINDOWS = 3
"""Most windows that a sheet shows, the first ones."""

ACROSS = 1600
"""About the width of a sheet's rows of windows, in pixels."""


@dataclass(frozen=True)
class TokenView:
    """A region on one of a model's token grids.

    Attributes:
        name: of the grid.
        coverage: [rows, columns], share of each token's area that lies in the region.
        drawn: [rows, columns], tokens that are drawn anew.
    """

    name: str
    coverage: Floats
    drawn: npt.NDArray[np.bool_]


class Painter(Protocol):
    """A model that draws in pictures of its own size (h, w)."""

    size: tuple[int, int]
    token: int  # pixels along the side of a token

    def paint(self, images: Pixels, region: Floats, variations: Sequence[int], step: int) -> Floats:
        """Draw the region [h, w] of images [B, h, w, 3] anew: [B, h, w, 3], 0 to 255.

        The numbers of the variations and of the step decide the random numbers.
        """

    def reconstruct(self, image: Pixels) -> Pixels:
        """What the tokenizer makes of an image [h, w, 3]."""

    def views(self, region: Floats) -> Sequence[TokenView]:
        """The region [h, w] on each token grid, coarse to fine."""


@dataclass(frozen=True)
class Plan:
    """What is drawn where.

    Attributes:
        canvas: the picture, or the canvas with the picture on it.
        region: [H, W], 255 where all is drawn anew.
        windows: where the model draws, in this order.
        feather: pixels around the region that are blended.
        blank: whether there is nothing in the region (out-painting).
    """

    canvas: Picture
    region: Pixels
    windows: tuple[Window, ...]
    feather: int
    blank: bool


def plan_region(
    picture: Picture,
    region: Pixels,
    model: tuple[int, int],
    *,
    context: float = CONTEXT,
    feather: int | None = None,
) -> Plan:
    """Plan to draw a region of a picture anew: a window around each of its parts that lie far apart.

    Args:
        picture: the picture.
        region: [H, W] uint8.
        model: (h, w) of the model's images.
        context: share of the region's sides that the window shows around it.
        feather: pixels; by default 1/32 of the smallest window's shorter side.

    Raises:
        UserError: an empty region, or one so long that its window would be too large.
    """
    windows = windows_around(region, model, context)
    for window in windows:
        check_size(window.height, window.width, "the window that shows the region")
    smallest = min(windows, key=lambda window: window.height)
    return Plan(picture, region, windows, _feather(smallest, feather), blank=False)


def plan_room(
    picture: Picture,
    room: Room,
    model: tuple[int, int],
    *,
    height: int = 0,
    overlap: float = 0.5,
    feather: int | None = None,
) -> Plan:
    """Plan to draw the room around a picture: windows that walk outwards.

    Args:
        picture: the picture.
        room: the canvas around it.
        model: (h, w) of the model's images.
        height: of a window, in pixels of the picture; 0 takes the largest that the picture fills.
        overlap: share of a window that is known when its turn comes, at least.
        feather: pixels; by default 1/32 of a window's shorter side.

    Raises:
        UserError: windows that are too large or too many.
    """
    scale = height / model[0] if height else min(picture.size[0] / model[0], picture.size[1] / model[1])
    side = max(2, round(scale * model[0])), max(2, round(scale * model[1]))
    check_size(*side, "a window")
    inner = room.left, room.top, room.left + picture.size[1], room.top + picture.size[0]
    region = room_region(room, picture.size)
    todo, windows = region.copy(), []
    for window in walk(room.size, inner, side, overlap):
        if todo[window.inside(room.size)].any():
            windows.append(window)
            todo[window.settled(room.size)] = 0
    canvas = picture.on_canvas(room.size, room.top, room.left)
    return Plan(canvas, region, tuple(windows), _feather(windows[0], feather), blank=True)


def _feather(window: Window, feather: int | None) -> int:
    return max(1, min(window.height, window.width) // 32) if feather is None else feather


def edit_picture(
    plan: Plan,
    painter: Painter,
    numbers: Sequence[int],
    *,
    match: bool = True,
    erase: bool = False,
    together: int = 1,
    advance: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[int, Picture]]:
    """Draw variations of a plan.

    Every pixel outside the feathered region is that of the canvas, to the bit. Variations are drawn a few at a time,
    so many that their canvases have at most `LIMIT` pixels together; what a variation is does not depend on that.

    Args:
        plan: what is drawn where.
        painter: the model.
        numbers: which variations.
        match: remove shifts of colour as they show around the region.
        erase: hide what is in the region now from the model, too.
        together: most variations that are drawn at once.
        advance: is told about finished windows.

    Yields:
        The number of a variation and its picture, whose pixels are its own.
    """
    height, width = plan.canvas.size
    together = max(1, min(together, LIMIT // (height * width)))
    for first in range(0, len(numbers), together):
        batch = numbers[first : first + together]
        canvases = [plan.canvas.copy() for _ in batch]
        todo = plan.region.copy() if plan.blank else plan.region
        for step, window in enumerate(plan.windows):
            _draw_window(plan, painter, canvases, todo, batch, step, match, erase)
            if plan.blank:
                todo[window.settled(plan.canvas.size)] = 0
            advance(len(batch))
        yield from zip(batch, canvases, strict=True)


def _draw_window(
    plan: Plan,
    painter: Painter,
    canvases: Sequence[Picture],
    todo: Pixels,
    numbers: Sequence[int],
    step: int,
    match: bool,
    erase: bool,
) -> None:
    """Draw one window of some variations and put it into their canvases."""
    window, model = plan.windows[step], painter.size
    size = plan.canvas.size
    place = window.inside(size)
    region = view_region(todo, window, model)
    hidden = _hidden(plan, region, window, erase)
    images = np.stack([view_image(canvas, window, model, hidden) for canvas in canvases])  # [B, h, w, 3]
    region = without_slivers(region, painter.token)
    drawn = painter.paint(images, region, numbers, step)
    weight = feathered(todo[place], plan.feather)
    (above, _), (before, _) = window.padding(size)
    for canvas, image, result in zip(canvases, images, drawn, strict=True):
        if match:
            result = match_colours(result, image, region, painter.token)
        pixels = fit(result.round().astype(np.uint8), window.height, window.width)
        height, width = weight.shape
        paste(canvas, place, pixels[above : above + height, before : before + width], weight)


def _hidden(plan: Plan, region: Floats, window: Window, erase: bool) -> npt.NDArray[np.bool_]:
    """What of a window's view the model's encoder must not see, [h, w]; nothing where nothing else would be left."""
    if plan.blank:
        hidden = region > 0
    elif erase:
        hidden = region > 0.5  # half-known pixels at a soft edge stay
    else:  # what lies outside the picture
        hidden = view_region(np.zeros_like(plan.region), window, (region.shape[0], region.shape[1])) > 0
    return hidden & ~hidden.all()


def fill_region(
    pictures: Pixels,
    region: Pixels,
    painter: Painter,
    numbers: Sequence[int],
    *,
    match: bool = True,
    erase: bool = False,
) -> Pixels:
    """Draw one region of several pictures of the model's size anew, as `edit_picture` does with a feather of 0.

    Args:
        pictures: [B, h, w, 3] uint8.
        region: [h, w] uint8, for all of them.
        painter: the model.
        numbers: of the variations, one a picture.
        match: remove shifts of colour as they show around the region.
        erase: hide what is in the region now from the model, too.

    Returns:
        [B, h, w, 3] uint8.
    """
    canvases = [Picture(each.copy()) for each in pictures]
    plan = plan_region(canvases[0], region, painter.size, feather=0)
    _draw_window(plan, painter, canvases, region, numbers, 0, match, erase)
    return np.stack([np.asarray(canvas.colour, np.uint8) for canvas in canvases])


def reconstruction(plan: Plan, painter: Painter) -> Picture:
    """What the tokenizer makes of the picture, in the window of a region, or in one around the middle of the rest."""
    canvas, size = plan.canvas.copy(), plan.canvas.size
    window = plan.windows[0]
    if plan.blank:
        left, top, right, bottom = bounds(255 - plan.region)
        window = Window(
            (top + bottom - window.height) // 2,
            (left + right - window.width) // 2,
            window.height,
            window.width,
        )
    unknown = plan.region if plan.blank else np.zeros_like(plan.region)
    hidden = view_region(unknown, window, painter.size) > 0
    image = view_image(plan.canvas, window, painter.size, hidden)
    pixels = fit(painter.reconstruct(image), window.height, window.width)
    place = window.inside(size)
    (above, _), (before, _) = window.padding(size)
    weight = 255 - unknown[place]
    paste(canvas, place, pixels[above:, before:][: weight.shape[0], : weight.shape[1]], weight)
    return canvas


def sheet(plan: Plan, again: Picture, variations: Iterable[Picture]) -> Image.Image:
    """Lay out input, region, the tokenizer's reconstruction and variations side by side; below, the windows alone.

    Args:
        plan: what was drawn.
        again: the `reconstruction`.
        variations: those to show, one at a time.
    """
    places = [window.inside(plan.canvas.size) for window in plan.windows[:WINDOWS]]
    tiles = [_tile(plan.canvas), shown_region(plan), _tile(again)]
    close = [[_close(plan.canvas, place)] for place in places]
    for each in variations:
        tiles.append(_tile(each))
        for row, place in zip(close, places, strict=True):
            row.append(_close(each, place))
    names = [f"variation {i}" for i in range(len(tiles) - 3)]
    captions = ["input", f"region, feather {plan.feather}", "tokenizer's reconstruction", *names]
    grids = [image_grid(tiles, 1 if _wide(plan.canvas) else 0, captions=captions)]
    for number, (row, (rows, columns)) in enumerate(zip(close, places, strict=True)):
        if row[0].shape == tiles[0].shape:  # shows nothing that the whole does not
            continue
        size = f"{columns.stop - columns.start} x {rows.stop - rows.start} px"
        captions = [f"input, window {number}: {size} at {columns.start}, {rows.start}", *names]
        grids.append(image_grid(row, max(1, ACROSS // row[0].shape[1]), captions=captions))
    return _stacked(grids)


def _stacked(images: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    """Images below each other on white."""
    height = sum(each.height + gap for each in images) - gap
    canvas, top = Image.new("RGB", (max(each.width for each in images), height), "white"), 0
    for each in images:
        canvas.paste(each, (0, top))
        top += each.height + gap
    return canvas


def _wide(picture: Picture) -> bool:
    """Whether a picture gets a row of a sheet to itself."""
    return picture.size[1] > 2 * picture.size[0]


def _tile(picture: Picture) -> Pixels:
    """A small copy [H, W, 3] for a sheet, enlarged by a whole factor where the picture itself is small."""
    side = 3 * TILE if _wide(picture) else TILE
    return _sized(picture.seen(slice(None), slice(None)), side, side)


def _close(picture: Picture, place: tuple[slice, slice]) -> Pixels:
    """A part of a picture [H, W, 3] to look at closely."""
    return _sized(picture.seen(*place), TILE, CLOSE)


def _sized(pixels: Pixels, least: int, most: int) -> Pixels:
    """Pixels [H, W, 3] enlarged by a whole factor up to `least` on the longer side, or reduced to `most`."""
    image, side = Image.fromarray(pixels), max(pixels.shape[:2])
    if side > most:
        image.thumbnail((most, most), Image.Resampling.BOX)
    factor = max(1, least // side)
    return np.asarray(image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST))


def shown_region(plan: Plan) -> Pixels:
    """The canvas with its region in red and the windows' outlines in blue, the size of a tile."""
    tile = _tile(plan.canvas)
    size = (tile.shape[1], tile.shape[0])
    region = np.asarray(Image.fromarray(plan.region).resize(size, Image.Resampling.BOX)) / 255
    image = Image.fromarray(_tinted(tile, 0.6 * region, (255, 0, 0)))
    pen, scale = ImageDraw.Draw(image), tile.shape[1] / plan.canvas.size[1]
    for window in plan.windows:
        left, top = max(window.left * scale, 0), max(window.top * scale, 0)
        right = min((window.left + window.width) * scale, size[0]) - 1
        bottom = min((window.top + window.height) * scale, size[1]) - 1
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline="blue")
    return np.asarray(image)


def _tinted(image: Pixels, share: npt.NDArray[np.floating], colour: tuple[int, int, int]) -> Pixels:
    """Mix a colour into [H, W, 3] by a share [H, W]."""
    mixed = (1 - share[..., None]) * image + share[..., None] * np.array(colour)
    tinted: Pixels = mixed.round().astype(np.uint8)
    return tinted


def window_views(
    plan: Plan, painter: Painter, *, erase: bool = False
) -> list[tuple[Window, Pixels, Sequence[TokenView]]]:
    """Each window with its image [h, w, 3] as it is before anything is drawn, and its region on the token grids."""
    todo = plan.region.copy()
    found = []
    for window in plan.windows:
        region = view_region(todo, window, painter.size)
        hidden = _hidden(plan, view_region(plan.region, window, painter.size), window, erase)
        image = view_image(plan.canvas, window, painter.size, hidden)
        found.append((window, image, painter.views(without_slivers(region, painter.token))))
        if plan.blank:
            todo[window.settled(plan.canvas.size)] = 0
    return found


def preview(
    plan: Plan, views: Sequence[tuple[Window, Pixels, Sequence[TokenView]]], most: int = 6
) -> Image.Image:
    """The region as the model sees it: the picture, then for each of the first windows a tile a token grid.

    Tokens that are drawn are red, the more the larger the part of them that lies in the region; those that lie in the
    region and are kept are blue.
    """
    side = 160
    first = Image.new("RGB", (side, side), "white")
    whole = Image.fromarray(shown_region(plan))
    whole.thumbnail((side, side), Image.Resampling.BOX)
    first.paste(whole, ((side - whole.width) // 2, (side - whole.height) // 2))
    tiles, captions = [], []
    for number, (window, image, grids) in enumerate(views[:most]):
        tiles.append(np.asarray(first))
        captions.append(f"window {number}: {window.width} x {window.height} at {window.left}, {window.top}")
        large = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
        for grid in grids:
            coverage = np.where(grid.coverage > 0, 0.3 + 0.5 * grid.coverage, 0)
            red = _enlarged(np.where(grid.drawn, coverage, 0), side)
            blue = _enlarged(np.where(grid.drawn, 0, coverage), side)
            tiles.append(_tinted(_tinted(large, red, (255, 0, 0)), blue, (0, 0, 255)))
            captions.append(f"{grid.name}: {int(grid.drawn.sum())} of {grid.drawn.size} tokens")
    return image_grid(tiles, columns=1 + len(views[0][2]), captions=captions)


def _enlarged(grid: npt.NDArray[np.floating], side: int) -> npt.NDArray[np.floating]:
    image = Image.fromarray(grid.astype(np.float32)).resize((side, side), Image.Resampling.NEAREST)
    return np.asarray(image)

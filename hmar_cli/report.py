"""Pictures for people: image grids and curves."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hmar_cli.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def to_uint8(images: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Turn images [B, 3, H, W] in [-1, 1] into [B, H, W, 3] uint8, rounding to the nearest level."""
    scaled = images.float().clamp(-1, 1).add(1).mul(127.5).round()
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def image_grid(
    images: Tensor | Sequence[np.ndarray[Any, Any]],
    columns: int = 0,
    gap: int = 2,
    captions: Sequence[str] = (),
) -> Image.Image:
    """Lay images out row by row on white.

    Args:
        images: [B, 3, H, W] in [-1, 1], or uint8 arrays [H, W, 3] of one size.
        columns: images a row; 0 makes the grid about square.
        gap: pixels between images.
        captions: written below the images, which are enlarged until there is room.

    Raises:
        ValueError: no images.
    """
    tiles = list(to_uint8(images)) if isinstance(images, Tensor) else list(images)
    if not tiles:
        raise ValueError("expected at least one image")
    if captions:
        tiles, gap = _captioned(tiles, captions), max(gap, 6)
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles[0].shape[:2]
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    canvas = Image.new("RGB", size, "white")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        canvas.paste(Image.fromarray(tile), (column * (width + gap), row * (height + gap)))
    return canvas


def _captioned(tiles: Sequence[np.ndarray[Any, Any]], captions: Sequence[str]) -> list[np.ndarray[Any, Any]]:
    """Tiles enlarged by a whole factor to at least 128 pixels, with their captions below."""
    factor = math.ceil(128 / tiles[0].shape[1])
    font = ImageFont.load_default(11)
    letters = max(8, tiles[0].shape[1] * factor // 6)  # a letter is about 6 pixels wide
    texts = [textwrap.wrap(caption, letters) or [""] for caption in captions]
    room = 14 * max(map(len, texts)) + 4
    result = []
    for tile, lines in zip(tiles, texts, strict=True):
        large = tile.repeat(factor, axis=0).repeat(factor, axis=1)
        canvas = Image.new("RGB", (large.shape[1], large.shape[0] + room), "white")
        canvas.paste(Image.fromarray(large))
        ImageDraw.Draw(canvas).multiline_text(
            (2, large.shape[0] + 1), "\n".join(lines), "black", font, spacing=2
        )
        result.append(np.asarray(canvas))
    return result


def labelled_grid(rows: Mapping[str, Sequence[np.ndarray[Any, Any]]]) -> Image.Image:
    """Lay out a row of images for each label, which stands to its left; images are enlarged until there is room.

    Args:
        rows: uint8 arrays [H, W, 3] of one size, by label.

    Raises:
        ValueError: no images.
    """
    columns = max(map(len, rows.values()), default=0)
    if not columns:
        raise ValueError("expected at least one row of images")
    size = next(images for images in rows.values() if len(images))[0].shape
    factor = math.ceil(64 / min(size[:2]))
    height, width = size[0] * factor, size[1] * factor
    font, gap = ImageFont.load_default(13), 4
    texts = {label: textwrap.wrap(label, 24) or [""] for label in rows}
    room = 12 + math.ceil(max(font.getlength(line) for lines in texts.values() for line in lines))
    canvas = Image.new("RGB", (room + columns * (width + gap), len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (label, images) in enumerate(rows.items()):
        top = y * (height + gap)
        pen.multiline_text((4, top + height / 2), "\n".join(texts[label]), "black", font, anchor="lm")
        for x, tile in enumerate(images):
            large = tile.repeat(factor, axis=0).repeat(factor, axis=1)
            canvas.paste(Image.fromarray(large), (room + x * (width + gap), top))
    return canvas


def pairs_grid(
    pairs: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]], columns: int = 0
) -> Image.Image:
    """Lay out pairs of images, the first of each above the second; smaller ones stand on white.

    Args:
        pairs: uint8 arrays [H, W, 3]; both of a pair have one size.
        columns: pairs a row; 0 fits about 2000 pixels.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("expected at least one pair of images")
    height, width = (max(first.shape[axis] for first, _ in pairs) for axis in (0, 1))
    factor = math.ceil(64 / min(height, width))
    columns = min(columns or max(2000 // (factor * width), 1), len(pairs))
    blank = np.full((factor * height, factor * width, 3), 255, np.uint8)

    def tile(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        canvas: np.ndarray[Any, Any] = blank.copy()
        rows, columns = image.shape[:2]
        canvas[: factor * rows, : factor * columns] = image.repeat(factor, axis=0).repeat(factor, axis=1)
        return canvas

    tiles = []
    for start in range(0, len(pairs), columns):
        row = pairs[start : start + columns]
        for which in (0, 1):
            tiles += [tile(pair[which]) for pair in row] + [blank] * (columns - len(row))
    return image_grid(tiles, columns)


def save_png(image: Image.Image, target: Path, *, fast: bool = False) -> None:
    """Write a PNG file that is either complete or absent; `fast` takes a quarter of the time and some more space."""
    with atomic_file(target) as temporary:
        image.save(temporary, format="PNG", compress_level=1 if fast else 6)


def plot_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, target: Path, grids: Sequence[str] = ()
) -> None:
    """Plot a metric of several runs over training, as a whole and for every scale (HMAR supplement, Fig. 16).

    Args:
        runs: rows of each run's metrics file, by a name for the legend.
        metric: such as "accuracy"; its "_per_scale" twin gives the small plots, of scales that have a number.
        target: PNG file to write.
        grids: names of the scales' token grids, such as "4x4"; empty where they are not known.

    Raises:
        ValueError: no run has the metric.
    """
    numbers = {
        name: [
            (row["step"], [row[metric], *row.get(f"{metric}_per_scale", ())]) for row in rows if metric in row
        ]
        for name, rows in runs.items()
    }
    count = max((len(found) for rows in numbers.values() for _, found in rows), default=0)
    if not count:
        raise ValueError(f"expected runs with the metric {metric!r}")
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for place in range(count):
        lines = {
            name: [
                (step, found[place]) for step, found in rows if found[place : place + 1] not in ([], [None])
            ]
            for name, rows in numbers.items()
        }
        if any(lines.values()):
            grid = f" ({grids[place - 1]})" if place and grids else ""
            panels[f"scale {place}{grid}" if place else metric.replace("_", " ")] = lines
    label, factor = ("accuracy (%)", 100) if metric == "accuracy" else (metric.replace("_", " "), 1)
    columns = min(4, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = new_figure(3.2 * columns, 2.6 * height)
    for place, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(height, columns, place + 1)
        for name, points in lines.items():
            dot = "." if len(points) == 1 else ""  # a line of one point would not be seen
            steps, values = [step for step, _ in points], [factor * value for _, value in points]
            axes.plot(steps, values, label=name, linewidth=1.2, marker=dot)
        dress_axes(axes, title, "step", label)
        if place == 0:
            axes.legend(fontsize=7)
    save_figure(figure, target)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def dress_axes(axes: "Axes", title: str, x: str, y: str) -> None:
    """Name a panel and its axes, units included, and leave out what carries no information."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def bar_figure(
    names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]], colours: Sequence[str] = ()
) -> "Figure":
    """A bar for each name, as long as the mean of its values and with a dot for each where there are several.

    Args:
        names: of the bars, from top to bottom.
        panels: by what they are called, their values for each name; an empty list leaves its bar out.
        colours: one a name; by default all bars have the same.
    """
    figure = new_figure(2.2 + 3.4 * len(panels), 1.0 + 0.42 * len(names))
    for x, (title, several) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), x + 1)
        dress_axes(axes, "", title, "")
        drawn = [(place, values) for place, values in enumerate(several) if values]
        fill = [colours[place] if colours else "#9db8d9" for place, _ in drawn]
        axes.barh([place for place, _ in drawn], [mean(v) for _, v in drawn], height=0.6, color=fill)
        for place, values in drawn:
            if len(values) > 1:
                axes.plot(values, [place] * len(values), "o", color="#1f4e79", markersize=3)
            text, end = f"{mean(values):.4g}", (max(values), place)
            axes.annotate(text, end, (5, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set_yticks(range(len(names)), names if x == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.margins(x=0.18)
    return figure


def save_figure(figure: "Figure", target: Path) -> None:
    """Write a figure to a PNG file that is either complete or absent."""
    with atomic_file(target) as temporary:
        figure.savefig(temporary, dpi=120, format="png")

"""`builtin:shapes`: coloured shapes with labels and captions, drawn at any size.

A picture is a function of (seed, index) alone; its geometry is relative to the short side, so that one index
is the same picture at every size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Array = npt.NDArray[np.float32]
Points = list[tuple[float, float]]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 52, 58),
    "orange": (244, 134, 34),
    "yellow": (250, 208, 48),
    "green": (58, 168, 84),
    "teal": (32, 170, 170),
    "blue": (48, 104, 214),
    "purple": (134, 72, 194),
    "pink": (240, 110, 170),
    "brown": (140, 90, 56),
    "white": (246, 246, 242),
    "black": (38, 38, 44),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 242, 236),
    "grey": (168, 172, 180),
    "blue": (158, 198, 240),
    "green": (176, 218, 172),
    "yellow": (248, 232, 160),
    "pink": (248, 200, 214),
    "purple": (206, 188, 238),
    "navy": (36, 48, 92),
    "black": (30, 30, 36),
}
CLASHES = {("white", "white"), ("black", "black"), ("black", "navy"), ("white", "yellow")}  # hard to see


@dataclass(frozen=True)
class Drawing:
    """One drawn picture.

    Attributes:
        image: RGB.
        label: index into `SHAPES`.
        caption: such as "a red circle on a blue background".
    """

    image: Image.Image
    label: int
    caption: str


def draw(index: int, *, size: tuple[int, int], seed: int = 0) -> Drawing:
    """Draw the picture of an index.

    Args:
        index: which picture, from 0 on.
        size: rows and columns.
        seed: another seed, other pictures.
    """
    rng = np.random.default_rng([seed, index])
    label = int(rng.integers(len(SHAPES)))
    names = [(c, b) for c in COLOURS for b in BACKGROUNDS if c != b and (c, b) not in CLASHES]
    colour, background = names[int(rng.integers(len(names)))]
    picture = _shade(BACKGROUNDS[background], size, rng, strength=0.10)
    radius = rng.uniform(0.24, 0.38)  # of the short side
    room_y, room_x = (side / min(size) / 2 - radius * 1.02 for side in size)
    centre = (rng.uniform(-1, 1) * max(room_y, 0), rng.uniform(-1, 1) * max(room_x, 0))
    mask = shape_mask(SHAPES[label], size, centre, radius, angle=rng.uniform(-0.45, 0.45))
    shadow = _shadow(mask, min(size), depth=rng.uniform(0.15, 0.35))
    picture *= 1 - shadow[..., None]
    paint = _shade(COLOURS[colour], size, rng, strength=0.14)
    alpha = np.asarray(mask, np.float32)[..., None] / 255
    picture += (paint - picture) * alpha
    image = Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8))
    article = "an" if colour[0] in "aeiou" else "a"
    return Drawing(image, label, f"{article} {colour} {SHAPES[label]} on a {background} background")


def _shade(
    colour: tuple[int, int, int], size: tuple[int, int], rng: np.random.Generator, strength: float
) -> Array:
    """A colour, a little varied, that grows lighter in a random direction: (rows, columns, 3)."""
    base = np.asarray(colour, np.float32) + rng.normal(0, 5, 3).astype(np.float32)
    angle, amount = rng.uniform(0, 2 * math.pi), strength * rng.uniform(0.3, 1.0)
    y = np.linspace(-1, 1, size[0], dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, size[1], dtype=np.float32)[None, :]
    slope = (math.sin(angle) * y + math.cos(angle) * x) * np.float32(amount)
    lighter, darker = np.maximum(slope, 0)[..., None], np.maximum(-slope, 0)[..., None]
    shaded: Array = base * (1 - darker) + (255 - base) * lighter
    return shaded


def shape_mask(
    shape: str, size: tuple[int, int], centre: tuple[float, float], radius: float, angle: float
) -> Image.Image:
    """How far each pixel is covered by a shape, 0 to 255, from a drawing four times as large.

    Args:
        shape: one of `SHAPES`.
        size: rows and columns.
        centre: its middle, (down, right) from the picture's; this and `radius` in parts of the short side.
        radius: of the circle that about holds it.
        angle: it is turned by this much clockwise, in radians.
    """
    factor = 4 if max(size) <= 1024 else 2
    unit = min(size) * factor
    mask = Image.new("L", (size[1] * factor, size[0] * factor))
    pen = ImageDraw.Draw(mask)
    middle_y = size[0] * factor / 2 + centre[0] * unit
    middle_x = size[1] * factor / 2 + centre[1] * unit
    cos, sin = math.cos(angle) * radius * unit, math.sin(angle) * radius * unit
    for points, value in OUTLINES[shape]():
        pen.polygon([(middle_x + x * cos - y * sin, middle_y + x * sin + y * cos) for x, y in points], value)
    return mask.reduce(factor)


def _shadow(mask: Image.Image, side: int, depth: float) -> Array:
    """A soft shadow below the shape, 0 to `depth`."""
    moved = Image.new("L", mask.size)
    moved.paste(mask, (round(0.015 * side), round(0.03 * side)))
    blurred = moved.filter(ImageFilter.GaussianBlur(0.025 * side))
    shadow: Array = np.asarray(blurred, np.float32) * np.float32(depth / 255)
    return shadow


def _regular(count: int, radii: tuple[float, ...] = (1.0,)) -> Points:
    """Corners around the origin, the first at the top, at the radii in turn."""
    turns = [2 * math.pi * i / count for i in range(count)]
    return [
        (radii[i % len(radii)] * math.sin(turn), -radii[i % len(radii)] * math.cos(turn))
        for i, turn in enumerate(turns)
    ]


def _heart() -> Points:
    turns = [2 * math.pi * i / 96 for i in range(96)]
    curve = [
        (
            16 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in turns
    ]
    return [(x / 17, (y - 2.5) / 17) for x, y in curve]


def _cross() -> Points:
    arm, long = 0.32, 0.95
    quarter = [(-arm, -long), (arm, -long), (arm, -arm)]
    corners: Points = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


OUTLINES: dict[str, Callable[[], list[tuple[Points, int]]]] = {
    "circle": lambda: [(_regular(128, (0.92,)), 255)],
    "square": lambda: [([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], 255)],
    "triangle": lambda: [([(x, y + 0.18) for x, y in _regular(3, (1.08,))], 255)],
    "star": lambda: [(_regular(10, (1.05, 0.45)), 255)],
    "ring": lambda: [(_regular(128, (0.98,)), 255), (_regular(128, (0.56,)), 0)],
    "cross": lambda: [(_cross(), 255)],
    "heart": lambda: [(_heart(), 255)],
    "diamond": lambda: [([(0, -1.05), (0.66, 0), (0, 1.05), (-0.66, 0)], 255)],
}
SHAPES: tuple[str, ...] = tuple(OUTLINES)
"""The classes."""

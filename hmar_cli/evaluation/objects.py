"""The objects of a picture of `builtin:scenes`, with colour, shape and place, found in the pixels.

Objects are told from the plain background, not by a model's opinion, so that a number means the same everywhere.

Letters: H W rows and columns of a picture.
"""

import functools
import itertools
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from hmar_cli.data.scenes import COLOURS, SHAPES, Thing
from hmar_cli.data.shapes import shape_mask

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

CONTRAST = 90.0
"""Distance in RGB from the background at which a pixel belongs to an object; named colours are over 200 away."""
SMALLEST = 0.008
"""Share of the picture below which an object is a speck; drawn ones cover over 0.03."""
FAR = 90.0
"""Distance in RGB from every named colour at which a colour has no name."""
LIKE = 0.7
"""Overlap over union with the best drawn shape below which a shape has no name."""
TURNS = (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3)
"""Angles at which shapes are compared; drawings are turned by at most 0.16."""
BLURS = (0.0, 0.15)
"""Softness of the edges of compared shapes, in their radii: decoders soften."""


@dataclass(frozen=True)
class Found:
    """An object in a picture: what it is and its middle, (down, right) in pixels."""

    thing: Thing
    middle: tuple[float, float]


def find_objects(image: npt.NDArray[np.uint8]) -> list[Found]:
    """Find the objects on a plain background, the largest first; specks are passed over.

    Args:
        image: (H, W, 3), on a plain light background.

    Returns:
        Each with its colour and shape, "unclear" where it is like none that has a name.

    Raises:
        ValueError: another array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
    pixels = image.astype(np.float32)
    frame = np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), *pixels[:, [0, 1, -2, -1]]]
    )
    background = np.median(frame, axis=0)
    contrast = np.linalg.norm(pixels - background, axis=-1)  # H W
    found = []
    for mask in connected(contrast > CONTRAST):
        if mask.mean() >= SMALLEST:
            strong = mask & (contrast >= 0.8 * np.quantile(contrast[mask], 0.9))
            paint = np.median(pixels[strong], axis=0)
            middle, shape = _shape_of(_coverage(pixels, background, paint, mask))
            found.append((mask.sum(), Found(Thing(_colour_of(paint), shape), middle)))
    return [each for _, each in sorted(found, key=lambda entry: -entry[0])]


def connected(mask: Mask) -> list[Mask]:
    """Split a mask (H, W) into its connected parts, each (H, W); pixels that touch at corners are apart."""
    left, parts = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        part, waiting = np.zeros_like(mask), deque([left.pop()])
        while waiting:
            y, x = waiting.popleft()
            part[y, x] = True
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    waiting.append(near)
        parts.append(part)
    return parts


def _colour_of(paint: Floats) -> str:
    distances = {name: float(np.linalg.norm(paint - np.asarray(rgb))) for name, rgb in COLOURS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] < FAR else "unclear"


def _coverage(pixels: Floats, background: Floats, paint: Floats, mask: Mask) -> Floats:
    """How far the object covers each pixel, 0 to 1 (H, W): its mask and the pixels around it, by their colour."""
    line = paint - background
    share = np.clip((pixels - background) @ line / (line @ line), 0, 1)
    around = mask.copy()
    for axis, step in itertools.product((0, 1), (-1, 1)):
        around |= _moved(mask, step, axis)
    return np.where(around, share, 0).astype(np.float32)


def _moved(mask: Mask, step: int, axis: int) -> Mask:
    """A mask moved by one pixel; what leaves the picture is lost."""
    moved = np.roll(mask, step, axis)
    moved[(slice(None),) * axis + (0 if step > 0 else -1,)] = False
    return moved


def _shape_of(coverage: Floats) -> tuple[tuple[float, float], str]:
    """The middle of an object and the name of its shape: of the drawn one of its area that covers it best."""
    area = float(coverage.sum())
    rows, columns = np.indices(coverage.shape, np.float32)
    middle = tuple(float((coverage * axis).sum() / area) for axis in (rows, columns))
    y, x = (round(value) for value in middle)
    half = math.ceil(1.2 * math.sqrt(area))  # from the middle to the edge of a window that holds every shape
    window = np.pad(coverage, half)[y : y + 2 * half + 1, x : x + 2 * half + 1]
    offset = (middle[0] - y, middle[1] - x)
    scores = {
        shape: max(_likeness(window, shape, area, offset, angle) for angle in TURNS) for shape in SHAPES
    }
    best = max(scores, key=scores.__getitem__)
    return (middle[0], middle[1]), best if scores[best] >= LIKE else "unclear"


def _likeness(window: Floats, shape: str, area: float, offset: tuple[float, float], angle: float) -> float:
    """Overlap over union of a window and the shape drawn with the same area and middle, turned: the best blur's."""
    side = window.shape[0]
    unit_area, (down, right) = _moments(shape)
    radius = math.sqrt(area / unit_area)
    sine, cosine = math.sin(angle), math.cos(angle)
    centre = (  # the middle of some shapes is off their centre of rotation
        (offset[0] - radius * (right * sine + down * cosine)) / side,
        (offset[1] - radius * (right * cosine - down * sine)) / side,
    )
    mask = shape_mask(shape, (side, side), centre, radius / side, angle)
    return max(_overlap(window, mask.filter(ImageFilter.GaussianBlur(blur * radius))) for blur in BLURS)


def _overlap(window: Floats, mask: Image.Image) -> float:
    """Overlap over union of a window and a drawn mask."""
    drawn = np.asarray(mask, np.float32) / 255
    return float(np.minimum(window, drawn).sum() / np.maximum(window, drawn).sum())


@functools.cache
def _moments(shape: str) -> tuple[float, tuple[float, float]]:
    """Area and middle (down, right) of a shape whose radius is 1."""
    side, radius = 256, 80.0
    drawn = np.asarray(shape_mask(shape, (side, side), (0, 0), radius / side, 0.0), np.float32) / 255
    rows, columns = np.indices(drawn.shape, np.float32) - (side - 1) / 2
    area = float(drawn.sum())
    middle = float((drawn * rows).sum() / area / radius), float((drawn * columns).sum() / area / radius)
    return area / radius**2, middle

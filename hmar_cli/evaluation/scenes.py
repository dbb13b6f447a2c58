"""Do pictures of `builtin:scenes` show what their prompts say? Colours, shapes and places, judged from the pixels.

Objects are told from the plain background, not from a model's opinion, so that a number means the same everywhere.

Letters: H W rows and columns of a picture.
"""

import functools
import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ImageFilter

from hmar_cli.data.scenes import COLOURS, RELATIONS, SHAPES, Scene, Thing, parse
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
class Verdict:
    """What of a prompt a picture shows.

    Attributes:
        colours: both objects have their colours.
        shapes: both objects have their shapes.
        places: the first object lies where the prompt says, seen from the second.
        seen: the picture in the words of a prompt, or how many objects it has.
    """

    colours: bool
    shapes: bool
    places: bool
    seen: str

    @property
    def all(self) -> bool:
        """Whether everything is right."""
        return self.colours and self.shapes and self.places


@dataclass(frozen=True)
class Found:
    """An object in a picture: what it is and its middle, (down, right) in pixels."""

    thing: Thing
    middle: tuple[float, float]


def judge(image: npt.NDArray[np.uint8], prompt: str) -> Verdict:
    """Compare a picture with its prompt.

    A picture without exactly two objects has nothing right. Which of the two is the prompt's first is decided in
    favour of the picture, for all three questions at once: a red square and a blue circle have the colours of "a
    red circle left of a blue square", or its shapes, but not both.

    Args:
        image: (H, W, 3), on a plain light background.
        prompt: a caption of `builtin:scenes`.

    Raises:
        ValueError: another array, or a prompt that is not a caption of a scene.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
    wanted, found = parse(prompt), find_objects(image)
    if len(found) != 2:
        return Verdict(False, False, False, f"{len(found)} object{'s' * (len(found) != 1)}")
    scenes = [Scene(a.thing, _relation(a, b), b.thing) for a, b in itertools.permutations(found)]
    verdicts = [_compare(scene, wanted) for scene in scenes]
    return max(
        verdicts, key=lambda verdict: (verdict.colours + verdict.shapes + verdict.places, verdict.colours)
    )


def _compare(seen: Scene, wanted: Scene) -> Verdict:
    pairs = ((seen.first, wanted.first), (seen.second, wanted.second))
    return Verdict(
        colours=all(is_.colour == should.colour for is_, should in pairs),
        shapes=all(is_.shape == should.shape for is_, should in pairs),
        places=seen.relation == wanted.relation,
        seen=str(seen),
    )


def _relation(first: Found, second: Found) -> str:
    """Where the first object lies, along the axis on which the two are further apart."""
    down, right = (first.middle[axis] - second.middle[axis] for axis in (0, 1))
    step = (0, int(math.copysign(1, right))) if abs(right) > abs(down) else (int(math.copysign(1, down)), 0)
    return next(relation for relation, place in RELATIONS.items() if place == step)


def find_objects(image: npt.NDArray[np.uint8]) -> list[Found]:
    """Find the objects on a plain background, the largest first; specks are passed over.

    Args:
        image: (H, W, 3).

    Returns:
        Each with its colour and shape, "unclear" where it is like none that has a name.
    """
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
        shape: max(_likeness(window, shape, area, offset, angle, blur) for angle in TURNS for blur in BLURS)
        for shape in SHAPES
    }
    best = max(scores, key=scores.__getitem__)
    return (middle[0], middle[1]), best if scores[best] >= LIKE else "unclear"


def _likeness(
    window: Floats, shape: str, area: float, offset: tuple[float, float], angle: float, blur: float
) -> float:
    """Overlap over union of a window and the shape drawn with the same area and middle, turned and blurred."""
    side = window.shape[0]
    unit_area, (down, right) = _moments(shape)
    radius = math.sqrt(area / unit_area)
    sine, cosine = (
        math.sin(angle),
        math.cos(angle),
    )  # the middle of some shapes is off their centre of rotation
    centre = (
        (offset[0] - radius * (right * sine + down * cosine)) / side,
        (offset[1] - radius * (right * cosine - down * sine)) / side,
    )
    mask = shape_mask(shape, (side, side), centre, radius / side, angle)
    drawn = np.asarray(mask.filter(ImageFilter.GaussianBlur(blur * radius)), np.float32) / 255
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


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927).

    Raises:
        ValueError: not 0 <= right <= count, or nothing was counted.
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"expected 0 <= right <= count and something counted, got {right} of {count}")
    z, share = 1.959964, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - spread), min(1.0, middle + spread)


def summary(verdicts: list[Verdict]) -> dict[str, dict[str, Any]]:
    """Count what is right: for colours, shapes, places and all three, the count, share and its 95 % interval.

    Raises:
        ValueError: no verdicts.
    """
    rows = {}
    for name in ("colours", "shapes", "places", "all"):
        right = sum(getattr(verdict, name) for verdict in verdicts)
        low, high = interval(right, len(verdicts))
        rows[name] = {"right": right, "share": right / len(verdicts), "low": low, "high": high}
    return rows

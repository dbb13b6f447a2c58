"""`builtin:scenes`: two coloured shapes and where one is seen from the other, for text-to-image models.

A picture is a function of (seed, index, split) alone; its geometry is relative to the short side, so that one index
is the same picture at every size. Its caption says all that matters of it: "a red circle left of a blue square".
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from hmar_cli.data.shapes import Drawing, shape_mask

Split = Literal["all", "train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
CLASSES = ("scene",)
"""Class names: captions are the condition."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 40, 48),
    "yellow": (246, 200, 30),
    "green": (36, 156, 72),
    "blue": (36, 92, 216),
    "purple": (164, 64, 190),
    "black": (34, 34, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
RELATIONS: dict[str, tuple[int, int]] = {
    # from the second object to the first: down, right
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}
BACKGROUND = 240
"""Grey level, varied a little."""
RADII = (0.155, 0.185)
"""Of the short side; outlines reach 1.08 times as far."""
DISTANCES = (0.47, 0.56)
"""Between the two middles, along the relation."""
EDGE = 0.29
"""How far from the centre a middle may lie."""
SIDESTEP = 0.1
"""Most that the second middle lies off the relation's axis."""
TURN = 0.16
"""Most that a shape is turned, in radians."""
HELD_OUT = 10
"""One arrangement of two objects in so many is in the test split alone; its objects come in others."""


@dataclass(frozen=True)
class Thing:
    """A coloured shape: `colour` of `COLOURS`, `shape` of `SHAPES`."""

    colour: str
    shape: str

    def __str__(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two things of different colours and the place of the first, seen from the second."""

    first: Thing
    relation: str
    second: Thing

    def __str__(self) -> str:
        return f"{self.first} {self.relation} {self.second}"

    @property
    def mirrored(self) -> "Scene":
        """The same picture said the other way round."""
        down, right = RELATIONS[self.relation]
        opposite = {place: relation for relation, place in RELATIONS.items()}[(-down, -right)]
        return Scene(self.second, opposite, self.first)


def draw(index: int, *, size: tuple[int, int], seed: int = 0, split: Split = "all") -> Drawing:
    """Draw the picture of an index.

    Args:
        index: which picture, from 0 on.
        size: rows and columns.
        seed: another seed, other pictures.
        split: "train" leaves out a tenth of what can be drawn, "test" draws it alone, "all" draws everything.

    Raises:
        ValueError: another split.
    """
    scenes = all_scenes(split)
    rng = np.random.default_rng([seed, index, SPLITS.index(split)])
    scene = scenes[int(rng.integers(len(scenes)))]
    picture = np.full((*size, 3), BACKGROUND + rng.uniform(-6, 6), np.float32)
    for thing, centre in zip((scene.first, scene.second), _places(scene.relation, rng), strict=True):
        radius, angle = rng.uniform(*RADII), rng.uniform(-TURN, TURN)
        alpha = np.asarray(shape_mask(thing.shape, size, centre, radius, angle), np.float32)[..., None] / 255
        paint = np.asarray(COLOURS[thing.colour], np.float32) + rng.normal(0, 4, 3).astype(np.float32)
        picture += (paint - picture) * alpha
    image = Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8))
    return Drawing(image, 0, str(scene))


def _places(relation: str, rng: np.random.Generator) -> tuple[tuple[float, float], tuple[float, float]]:
    """The middles of the first and the second object, (down, right) from the picture's centre."""
    distance, sidestep = rng.uniform(*DISTANCES), rng.uniform(-SIDESTEP, SIDESTEP)
    axis = np.asarray(RELATIONS[relation], float)
    step = axis * distance + axis[::-1] * sidestep  # from the second to the first
    room = EDGE - np.abs(step) / 2
    middle = rng.uniform(-1, 1, 2) * room
    first, second = middle + step / 2, middle - step / 2
    return (float(first[0]), float(first[1])), (float(second[0]), float(second[1]))


@functools.cache
def all_scenes(split: Split = "all") -> tuple[Scene, ...]:
    """Every scene of a split. A scene and its `mirrored` form are one picture and in one split.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"expected a split of {', '.join(SPLITS)}, got {split!r}")
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [pair for pair in itertools.combinations(things, 2) if pair[0].colour != pair[1].colour]
    pictures = [Scene(first, relation, second) for first, second in pairs for relation in RELATIONS]
    order = np.random.default_rng(0).permutation(len(pictures))  # the split is the same for every seed
    held_out = set(order[: len(pictures) // HELD_OUT].tolist())
    kept = [p for i, p in enumerate(pictures) if split == "all" or (i in held_out) == (split == "test")]
    return tuple(scene for picture in kept for scene in (picture, picture.mirrored))


def prompts(count: int, *, seed: int = 0, split: Split = "all") -> list[str]:
    """Captions of `count` scenes in a random order; none comes again before all have come.

    Raises:
        ValueError: an unknown split.
    """
    scenes, rng = all_scenes(split), np.random.default_rng(seed)
    rounds = math.ceil(count / len(scenes))
    order = [int(i) for _ in range(rounds) for i in rng.permutation(len(scenes))]
    return [str(scenes[i]) for i in order[:count]]


def parse(prompt: str) -> Scene:
    """Read a caption back: "a red circle left of a blue square".

    Raises:
        ValueError: it is not a caption of a scene.
    """
    words = prompt.lower().strip().removesuffix(".").split()
    for relation in RELATIONS:
        middle = relation.split()
        if len(words) == 6 + len(middle) and words[3:-3] == middle:
            first, second = Thing(*words[1:3]), Thing(*words[-2:])
            articles = {words[0], words[-3]} <= {"a", "an", "the"}
            known = all(thing.colour in COLOURS and thing.shape in SHAPES for thing in (first, second))
            if articles and known and first.colour != second.colour:
                return Scene(first, relation, second)
    raise ValueError(
        f"expected two things of different colours such as 'a red circle left of a blue square' (colours: "
        f"{', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; {', '.join(RELATIONS)}), got {prompt!r}"
    )

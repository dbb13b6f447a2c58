"""Do pictures of `builtin:scenes` show what their prompts say? Colours, shapes and places.

Letters: H W rows and columns of a picture.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from hmar_cli.console import progress
from hmar_cli.data.samples import read_samples
from hmar_cli.data.scenes import RELATIONS, Scene, parse
from hmar_cli.errors import UserError
from hmar_cli.evaluation.objects import Found, find_objects


@dataclass(frozen=True)
class Verdict:
    """Which parts of a prompt a picture shows.

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


def judge(image: npt.NDArray[np.uint8], prompt: str) -> Verdict:
    """Look at a picture and compare what is seen with its prompt.

    Args:
        image: (H, W, 3), on a plain light background.
        prompt: a caption of `builtin:scenes`.

    Raises:
        ValueError: another array, or a prompt that is not a caption of a scene.
    """
    return compare(find_objects(image), prompt)


def compare(found: Sequence[Found], prompt: str) -> Verdict:
    """Compare the objects of a picture with its prompt.

    A picture without exactly two objects has nothing right. Which of the two is the prompt's first is decided in
    favour of the picture, for all three questions at once: a red square and a blue circle have the colours of "a
    red circle left of a blue square", or its shapes, but not both.

    Args:
        found: as `find_objects` returns them.
        prompt: a caption of `builtin:scenes`.

    Raises:
        ValueError: a prompt that is not a caption of a scene.
    """
    wanted = parse(prompt)
    if len(found) != 2:
        return Verdict(False, False, False, f"{len(found)} object{'s' * (len(found) != 1)}")
    scenes = [Scene(a.thing, _relation(a, b), b.thing) for a, b in itertools.permutations(found)]
    verdicts = [_verdict(scene, wanted) for scene in scenes]
    return max(
        verdicts, key=lambda verdict: (verdict.colours + verdict.shapes + verdict.places, verdict.colours)
    )


def _verdict(seen: Scene, wanted: Scene) -> Verdict:
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


def prompted_images(folder: Path) -> tuple[list[str], list[Path]]:
    """Read what `hmar sample --prompt-file` wrote: the prompts, and the images in order.

    Raises:
        UserError: another folder, one without prompts, or images that are missing.
    """
    about, images = read_samples(folder)
    prompts = about.get("prompts")
    if not prompts or not isinstance(prompts, list) or not all(isinstance(each, str) for each in prompts):
        raise UserError(
            f"{folder} holds images without prompts", "give a folder that `hmar sample --prompt-file` wrote"
        )
    return prompts, images


def judge_images(images: list[Path], prompts: list[str]) -> list[Verdict]:
    """Judge image i by prompt i, beginning again where the prompts end.

    Raises:
        UserError: a prompt that is not of the scenes, or an image that cannot be read.
    """
    try:
        for prompt in prompts:
            parse(prompt)
    except ValueError as error:
        hint = "`hmar eval scene-prompts 100` prints prompts that can be judged"
        raise UserError(f"{error}", hint) from error
    verdicts = []
    with progress("judging", len(images)) as bar:
        for i, path in enumerate(images):
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
            except OSError as error:
                raise UserError(f"cannot read {path}: {error}", "draw it again with `hmar sample`") from error
            verdicts.append(judge(pixels, prompts[i % len(prompts)]))
            bar.advance()
    return verdicts


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

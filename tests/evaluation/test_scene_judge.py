"""The judge of scenes, on drawings whose contents are known."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from hmar_cli.data.scenes import COLOURS, RELATIONS, SHAPES, all_scenes, draw, parse
from hmar_cli.data.shapes import shape_mask
from hmar_cli.evaluation.objects import connected, find_objects
from hmar_cli.evaluation.scenes import Verdict, compare, interval, judge, summary

Pixels = np.ndarray
Objects = tuple[tuple[str, str, tuple[float, float]], ...]
PROMPT = "a red circle left of a blue square"
RIGHT: Objects = (("red", "circle", (0.0, -0.25)), ("blue", "square", (0.05, 0.25)))


def paint(objects: Objects, size: int = 64, radius: float = 0.17) -> Pixels:
    """Objects of (colour, shape, (down, right) from the centre in parts of the side) on light grey."""
    picture = np.full((size, size, 3), 240.0)
    for colour, shape, place in objects:
        alpha = np.asarray(shape_mask(shape, (size, size), place, radius, 0.0), float)[..., None] / 255
        picture += (np.asarray(COLOURS[colour]) - picture) * alpha
    return picture.round().astype(np.uint8)


def as_drawn(image: Image.Image, index: int) -> Image.Image:
    return image


def jpeg(image: Image.Image, index: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert("RGB")


def soft_and_noisy(image: Image.Image, index: int) -> Image.Image:
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(image.width / 64)), float)
    noise = np.random.default_rng(index).normal(0, 8, blurred.shape)
    return Image.fromarray((blurred + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "change", "least"),
    [
        (64, as_drawn, 1.0),
        (32, as_drawn, 1.0),
        (96, as_drawn, 1.0),
        (64, jpeg, 0.99),
        (64, soft_and_noisy, 0.99),
        (32, soft_and_noisy, 0.99),
    ],
)
def test_drawings_are_judged_right(
    size: int, change: Callable[[Image.Image, int], Image.Image], least: float
) -> None:
    count, right = 40, 0
    for index in range(count):
        drawing = draw(index, size=(size, size), seed=7)
        verdict = judge(np.asarray(change(drawing.image, index)), drawing.caption)
        right += verdict.all and verdict.seen in (drawing.caption, str(parse(drawing.caption).mirrored))
    assert right >= least * count


def test_another_prompt_is_judged_wrong() -> None:
    """A picture has exactly the prompts of its own scene, among all."""
    drawing = draw(4, size=(64, 64))
    found, own = find_objects(np.asarray(drawing.image)), parse(drawing.caption)
    scenes = {*all_scenes()[::20], own, own.mirrored}
    assert {scene for scene in scenes if compare(found, str(scene)).all} == {own, own.mirrored}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PROMPT, (True, True, True)),
        ("a blue square right of a red circle", (True, True, True)),
        ("a green circle left of a blue square", (False, True, True)),
        ("a red star left of a blue square", (True, False, True)),
        ("a red circle right of a blue square", (True, True, False)),
        ("a red circle above a blue square", (True, True, False)),
        ("a blue circle left of a red square", (False, True, True)),  # colours at the wrong shapes
        ("a green star above a black cross", (False, False, False)),
    ],
)
def test_colours_shapes_and_places_are_told_apart(prompt: str, expected: tuple[bool, bool, bool]) -> None:
    verdict = judge(paint(RIGHT), prompt)
    assert (verdict.colours, verdict.shapes, verdict.places) == expected
    assert verdict.all == all(expected)


@pytest.mark.parametrize(
    ("objects", "seen"),
    [
        ((), "0 objects"),
        (RIGHT[:1], "1 object"),
        ((*RIGHT, ("green", "star", (0.3, 0.0))), "3 objects"),
        ((("red", "circle", (0.0, -0.1)), ("blue", "square", (0.0, 0.1))), "1 object"),  # they touch
    ],
)
def test_other_numbers_of_objects_are_wrong(objects: Objects, seen: str) -> None:
    assert judge(paint(objects), PROMPT) == Verdict(False, False, False, seen)


def test_specks_are_passed_over_and_a_touched_edge_does_no_harm() -> None:
    image = paint((("red", "circle", (0.0, -0.34)), RIGHT[1]))
    image[2:5, 30:33] = 0
    assert (image[:, 0] != 240).any()
    assert judge(image, PROMPT).all


def test_what_has_no_name_is_unclear() -> None:
    image = paint(RIGHT)
    square = (image != 240).any(axis=-1) & (np.arange(64) > 32)
    image[square] = (130, 130, 130)
    assert judge(image, PROMPT).seen == "a red circle left of an unclear square"
    bar = np.full((64, 64, 3), 240, np.uint8)
    bar[28:34, 4:60] = COLOURS["red"]
    (found,) = find_objects(bar)
    assert (found.thing.colour, found.thing.shape) == ("red", "unclear")
    assert found.middle == pytest.approx((30.5, 31.5), abs=0.1)


@pytest.mark.parametrize("relation", RELATIONS)
def test_places_follow_the_longer_axis(relation: str) -> None:
    down, right = RELATIONS[relation]
    objects = tuple(
        (colour, shape, (sign * 0.25 * down + 0.05 * sign * abs(right), sign * 0.25 * right))
        for sign, colour, shape in ((1, "red", "circle"), (-1, "blue", "square"))
    )
    assert judge(paint(objects), f"a red circle {relation} a blue square").all


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_colour_and_shape(colour: str, shape: str) -> None:
    for size in (32, 64):
        (found,) = find_objects(paint(((colour, shape, (0.1, -0.1)),), size))
        assert (found.thing.colour, found.thing.shape) == (colour, shape)


def test_connected_parts_do_not_meet_at_corners() -> None:
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0]], bool)
    parts = connected(mask)
    assert sorted(int(part.sum()) for part in parts) == [1, 2, 2]
    assert (sum(part.astype(int) for part in parts) == mask).all()
    assert connected(np.zeros((3, 3), bool)) == []


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"float64 \(4, 4, 3\)"):
        judge(np.zeros((4, 4, 3)), PROMPT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'a cat'"):
        judge(paint(RIGHT), "a cat")


def test_intervals_are_wilsons() -> None:
    assert interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # Brown, Cai & DasGupta 2001
    assert interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, Table I
    for wrong in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="something counted"):
            interval(*wrong)


def test_summary_counts() -> None:
    verdicts = [Verdict(True, True, False, ""), Verdict(True, True, True, ""), Verdict(True, False, True, "")]
    rows = summary(verdicts)
    assert {name: row["right"] for name, row in rows.items()} == {
        "colours": 3,
        "shapes": 2,
        "places": 2,
        "all": 1,
    }
    assert rows["all"]["share"] == pytest.approx(1 / 3)
    assert (rows["all"]["low"], rows["all"]["high"]) == interval(1, 3)

"""Regions: boxes, masks, room around a picture, and the feather."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hmar_cli.errors import UserError
from hmar_cli.pictures.regions import (
    NOTHING,
    Length,
    bounds,
    box_region,
    feathered,
    grow,
    parse_box,
    parse_canvas,
    parse_length,
    read_mask,
    room_around,
    room_region,
)


def distance(region: np.ndarray) -> np.ndarray:
    """Of each pixel to the nearest one of the region, in steps of a king."""
    rows, columns = np.indices(region.shape)
    places = np.argwhere(region > 0)
    down, along = (np.abs(each[..., None] - places[:, i]) for i, each in enumerate((rows, columns)))
    return np.maximum(down, along).min(axis=-1)


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("1,2,7,9", (10, 20), (1, 2, 7, 9)),
        ("0.25, 0.5, 0.75, 1", (10, 20), (5, 5, 15, 10)),
        ("0.01,0.01,0.02,0.02", (10, 10), (0, 0, 1, 1)),  # a share of a pixel is the whole
        ("0,0,1,1", (10, 10), (0, 0, 1, 1)),
        ("0.,0,1,1", (10, 10), (0, 0, 10, 10)),
        ("0.29,0.57,0.58,0.7", (100, 100), (29, 57, 58, 70)),  # in floating point 28.99 … and 57.99 …
        ("0.07,0,0.28,0.14", (100, 100), (7, 0, 28, 14)),
    ],
)
def test_boxes_are_pixels_or_shares(
    text: str, size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert parse_box(text).pixels(size) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3", "expected four numbers"),
        ("a,b,c,d", "expected four numbers"),
        ("5,5,5,9", "the region is empty"),
        ("9,5,5,9", "the region is empty"),
        ("0.1,0.1,1.5,0.5", "between 0 and 1"),
        ("-0.1,0.1,0.5,0.5", "between 0 and 1"),
        ("0,0,inf,1", "finite"),
        ("nan,0,1,1", "finite"),
    ],
)
def test_boxes_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_box(text)


@pytest.mark.parametrize("text", ["-1,0,3,3", "0,0,21,3", "0,0,3,11", "50,50,60,60"])
def test_a_box_outside_the_picture(text: str) -> None:
    with pytest.raises(UserError, match=r"reaches out of cat\.png, which has 20 x 10 pixels"):
        parse_box(text).pixels((10, 20), "cat.png")


def test_margins_and_canvases() -> None:
    assert parse_length("64", "--left") == Length(64, False)
    assert parse_length("0.5", "--left").pixels(30) == 15
    assert parse_canvas("768x512") == (512, 768)
    half = Length(0.5, True)
    room = room_around((10, 20), [half, NOTHING, Length(3, False), half])
    assert (room.size, room.top, room.left) == ((15, 33), 0, 10)
    middle = room_around((10, 20), canvas=(20, 41))
    assert (middle.size, middle.top, middle.left) == ((20, 41), 5, 10)
    moved = room_around((10, 20), [Length(1, False), NOTHING, NOTHING, Length(2, False)], (20, 40))
    assert (moved.top, moved.left) == (8, 1)
    region = room_region(moved, (10, 20))
    assert (region == 0).sum() == 200 and (region[8:18, 1:21] == 0).all()


@pytest.mark.parametrize("text", ["-5", "left", "", "nan", "1e99", "0.5x"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="expected pixels or a share"):
        parse_length(text, "--left")


@pytest.mark.parametrize("text", ["768", "x", "0x5", "-1x5", "5x", "axb"])
def test_canvases_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="expected a size"):
        parse_canvas(text)


def test_rooms_that_are_none() -> None:
    with pytest.raises(
        UserError, match="the region is empty: the picture fills the canvas of 20 x 10"
    ) as error:
        room_around((10, 20))
    assert "--canvas 30x10" in error.value.hint
    with pytest.raises(UserError, match="smaller than the picture"):
        room_around((10, 20), canvas=(10, 19))
    with pytest.raises(UserError, match="leave the canvas"):
        room_around((10, 20), [Length(5, False), *[NOTHING] * 3], (10, 24))
    with pytest.raises(UserError, match="more than the"):
        room_around((10, 20), canvas=(1 << 14, 1 << 14))


def test_masks(tmp_path: Path) -> None:
    values = np.array([[0, 128, 255], [255, 0, 3]], np.uint8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    colour = np.full((2, 3, 4), 255, np.uint8)
    colour[..., 3] = values  # white where it is opaque
    Image.fromarray(colour).save(tmp_path / "clear.png")
    turned = Image.fromarray(np.rot90(values, 1).copy())  # a viewer turns it upright
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("grey", "deep", "clear", "turned"):
        assert (read_mask(tmp_path / f"{name}.png", (2, 3)) == values).all(), name
    with pytest.raises(UserError, match="the mask has 3 x 2 pixels, the picture 2 x 3"):
        read_mask(tmp_path / "grey.png", (3, 2))


def test_photographs_are_doubtful_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    drawn = np.zeros((60, 80), np.uint8)
    drawn[10:40, 10:50] = 255
    soft = np.minimum(drawn, np.arange(80, dtype=np.uint8) * 3)  # less than half of it
    red = np.zeros((60, 80, 3), np.uint8)
    red[10:40, 10:50, 0] = 255
    grey = rng.integers(60, 200, (60, 80)).astype(np.uint8)
    for name, values, warning in (
        ("drawn.jpg", np.stack([drawn] * 3, axis=-1), ""),
        ("soft.png", soft, ""),
        ("red.png", red, "25% of it has colours"),
        ("photo.jpg", rng.integers(0, 256, (60, 80, 3)).astype(np.uint8), "has colours"),
        ("grey.png", grey, "100% of it is neither black nor white"),
        ("deep.png", grey.astype(np.uint16) * 257, "100% of it is neither black nor white"),
    ):
        Image.fromarray(values).save(tmp_path / name)
        read_mask(tmp_path / name, (60, 80))
        said = capsys.readouterr().err
        assert warning in said and bool(said) == bool(warning), name


def test_an_empty_region() -> None:
    with pytest.raises(UserError, match="the region is empty"):
        bounds(np.zeros((4, 4), np.uint8))
    assert bounds(box_region((9, 9), [(1, 2, 3, 4), (5, 3, 6, 8)])) == (1, 2, 6, 8)


def test_grow_takes_the_largest_of_a_square() -> None:
    rng = np.random.default_rng(0)
    for radius in (0, 1, 2, 3, 5, 9, 40):
        region = rng.integers(0, 256, (7, 12), np.uint8)
        expected = [
            [
                region[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1].max()
                for x in range(12)
            ]
            for y in range(7)
        ]
        assert (grow(region, radius) == expected).all()
    assert (grow(region, 10**9) == region.max()).all()  # without room for as many pixels


def test_the_feather_falls_from_the_region_to_nothing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width, feather = (int(v) for v in rng.integers(1, [40, 40, 12]))
        region = np.zeros((height, width), np.uint8)
        for _ in range(rng.integers(1, 4)):
            left, top = rng.integers(0, width), rng.integers(0, height)
            value = rng.choice([255, rng.integers(1, 256)])
            region[top : top + rng.integers(1, 12), left : left + rng.integers(1, 12)] = value
        weight, far = feathered(region, feather), distance(region)
        assert (weight >= region).all()
        assert (weight[far > feather] == 0).all()
        assert (weight[region == 255] == 255).all()
        if (
            region.max() == 255
            and (near := (far == 1) & (grow((region == 255) * np.uint8(255), 1) == 255)).any()
        ):
            assert (weight[near] > 0).all()


def test_along_a_straight_edge_the_feather_falls_evenly() -> None:
    region = box_region((60, 60), [(0, 0, 20, 60)])
    row = feathered(region, 8)[30].astype(int)
    steps = -np.diff(row[19:29])
    assert row[27] > 0 and row[28] == 0 and (steps > 0).all() and steps.max() - steps.min() <= 2
    assert (feathered(region, 0) == region).all()
    with pytest.raises(ValueError, match="a feather of 0 or more"):
        feathered(region, -1)

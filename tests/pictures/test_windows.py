"""Windows: where a model looks, for a region and on a walk to the edges of a canvas."""

import numpy as np
import pytest
from PIL import Image

from hmar_cli.errors import UserError
from hmar_cli.pictures.picture import Picture
from hmar_cli.pictures.windows import (
    PARTS,
    Window,
    parts,
    view_image,
    view_region,
    walk,
    window_around,
    windows_around,
    without_slivers,
)


def random_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
    return left, top, int(rng.integers(left, width)) + 1, int(rng.integers(top, height)) + 1


def test_a_window_holds_the_region_and_lies_inside_where_it_can() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        size = int(rng.integers(1, 200)), int(rng.integers(1, 200))
        model = (32, 32) if rng.random() < 0.7 else (32, 48)
        left, top, right, bottom = box = random_box(rng, *size)
        window = window_around(box, size, model)
        assert window.top <= top and window.left <= left
        assert window.top + window.height >= bottom and window.left + window.width >= right
        assert abs(window.height * model[1] - window.width * model[0]) <= 2 * max(model)  # the model's shape
        rows, columns = window.inside(size)
        fits = window.height <= size[0] and window.width <= size[1]
        assert (rows.stop - rows.start, columns.stop - columns.start) == (
            min(window.height, size[0]),
            min(window.width, size[1]),
        )
        inside += fits
        least = 1.25 * max((bottom - top) / model[0], (right - left) / model[1])
        if min(size[0] / model[0], size[1] / model[1]) >= least:
            assert fits
    assert inside > 500


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        ((100, 100, 110, 110), (400, 400), Window(89, 89, 32, 32)),  # no smaller than the model's images
        ((100, 100, 200, 150), (400, 400), Window(25, 50, 200, 200)),  # half of the region's sides around it
        ((0, 0, 100, 100), (400, 400), Window(0, 0, 200, 200)),  # moved inside
        ((300, 0, 400, 100), (150, 400), Window(0, 250, 150, 150)),  # as much context as there is
        ((0, 0, 400, 100), (100, 400), Window(-150, 0, 400, 400)),  # reaches out
        ((2, 2, 4, 4), (16, 16), Window(0, 0, 16, 16)),  # a picture smaller than the model's
    ],
)
def test_windows_in_particular(
    box: tuple[int, int, int, int], size: tuple[int, int], expected: Window
) -> None:
    assert window_around(box, size, (32, 32)) == expected


def test_parts_that_lie_apart_have_windows_of_their_own() -> None:
    """Every part is whole in one window, and no other window shows any of it."""
    rng = np.random.default_rng(1)
    several = 0
    for _ in range(300):
        region = np.zeros((int(rng.integers(1, 500)), int(rng.integers(1, 500))), np.uint8)
        for _ in range(int(rng.integers(1, 5))):
            left, top, right, bottom = random_box(rng, *region.shape)
            region[top : min(bottom, top + 40), left : min(right, left + 40)] = 200
        windows = windows_around(region, (32, 32))
        several += len(windows) > 1
        shown = np.zeros(region.shape, int)
        for window in windows:
            shown[window.inside(region.shape)] += 1
        assert (shown[region > 0] == 1).all()
        for left, top, right, bottom in parts(region):
            assert region[top:bottom, left:right].any()
            assert (
                sum(
                    w.top <= top
                    and w.left <= left
                    and w.top + w.height >= bottom
                    and w.left + w.width >= right
                    for w in windows
                )
                == 1
            )
    assert several > 50


def test_a_small_part_is_drawn_beside_a_large_one() -> None:
    region = np.zeros((1000, 1000), np.uint8)
    region[10:410, 10:410] = 255
    region[900:906, 900:906] = 255
    large, small = sorted(windows_around(region, (32, 32)), key=lambda window: -window.height)
    assert (large.height, small.height) == (800, 32)  # with their context; no smaller than the model's images
    for window in (large, small):
        view = without_slivers(view_region(region, window, (32, 32)), 4)
        assert view.max() > 0.5


def test_a_region_of_very_many_parts_is_one() -> None:
    region = np.zeros((64, 64), np.uint8)
    region[::4, ::4] = 255
    assert parts(region) == [(0, 0, 61, 61)]
    region[16:] = 0
    assert len(parts(region)) == PARTS == 64


def test_a_walk_covers_the_canvas_and_each_window_meets_what_is_known() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = int(rng.integers(1, 90)), int(rng.integers(1, 160))
        inner = left, top, right, bottom = random_box(rng, height, width)
        chosen = max(2, min(bottom - top, right - left))  # as the command does
        side = chosen if rng.random() < 0.5 else int(rng.integers(2, 50))
        overlap = float(rng.choice([0.25, 0.5, 0.7]))
        known = np.zeros((height, width), bool)
        known[top:bottom, left:right] = True
        for window in walk((height, width), inner, (side, side), overlap):
            place = window.inside((height, width))
            part = known[place]
            assert part.any()  # there is something to go on from
            known[window.settled((height, width))] = True
        assert known.all()


def test_a_panorama_is_walked_to_both_sides_by_half_windows() -> None:
    windows = walk((64, 256), (96, 0, 160, 64), (64, 64))
    assert {each.top for each in windows} == {0}
    right = [each.left for each in windows if each.left > 96]
    left = [each.left for each in windows if each.left < 96]
    assert right == [128, 160, 192] and left == [64, 32, 0]
    with pytest.raises(ValueError, match="an overlap"):
        walk((64, 256), (96, 0, 160, 64), (64, 64), 0.1)


def test_a_walk_of_very_many_windows_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"takes 15992001 windows of 4 x 4 pixels"):
        walk((8000, 8000), (0, 0, 4, 4), (4, 4))


def test_views_keep_the_pixels_where_no_size_changes() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    window, nothing = Window(3, 7, 16, 16), np.zeros((16, 16), bool)
    assert (view_image(Picture(colour), window, (16, 16), nothing) == colour[3:19, 7:23]).all()
    region = np.zeros((40, 50), np.uint8)
    region[3:9, 7:23] = 255
    region[9, 7:23] = 51
    seen = view_region(region, window, (16, 16))
    assert (seen[:6] == 1).all() and np.allclose(seen[6], 0.2) and (seen[7:] == 0).all()


def test_a_region_is_averaged_over_areas_and_is_everything_outside() -> None:
    region = np.zeros((8, 32), np.uint8)
    region[0, 0] = 255
    seen = view_region(region, Window(-12, 0, 32, 32), (8, 8))  # rows -12 to 20 of 8
    assert (seen[:3] == 1).all() and (seen[5:] == 1).all()
    assert seen[3, 0] == np.float32(1 / 16) and (seen[3:5].ravel()[1:] == 0).all()
    assert (view_region(np.full((8, 32), 255, np.uint8), Window(-12, 0, 32, 32), (7, 7)) == 1).all()
    one = np.zeros((3000, 3000), np.uint8)
    one[1500, 1500] = 255  # a pixel of a large picture is not lost
    assert (view_region(one, Window(0, 0, 3000, 3000), (16, 16)) > 0).sum() == 1


def test_slivers_of_tokens_are_left_out() -> None:
    region = np.zeros((8, 8), np.float32)
    region[:5, 1:6] = 1  # of tokens of 4 pixels: 12/16, 8/16 | 3/16, 2/16
    seen = without_slivers(region, 4)
    assert (seen[:4] == region[:4]).all() and (seen[4:] == 0).all()
    small = np.zeros((8, 8), np.float32)
    small[3:5, 3:5] = 0.5  # a sixteenth of four tokens, but there is nothing larger
    assert (without_slivers(small, 4) == small).all()
    assert (without_slivers(np.ones((8, 8), np.float32), 4) == 1).all()


def test_what_is_unknown_continues_its_surroundings() -> None:
    colour = np.full((16, 16, 3), 90, np.uint8)
    colour[:, 8:] = 255  # is not to be seen
    unknown = np.zeros((16, 16), bool)
    unknown[:, 8:] = True
    assert (view_image(Picture(colour), Window(0, 0, 16, 16), (16, 16), unknown) == 90).all()
    half = np.asarray(Image.fromarray(colour).resize((8, 8)))
    assert half.max() == 255

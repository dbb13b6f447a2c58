"""Editing pictures of any size with painters whose drawings are known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hmar_cli.errors import UserError
from hmar_cli.pictures import editing
from hmar_cli.pictures.editing import (
    TokenView,
    edit_picture,
    plan_region,
    plan_room,
    preview,
    reconstruction,
    sheet,
    window_views,
)
from hmar_cli.pictures.picture import Picture
from hmar_cli.pictures.regions import Length, bounds, box_region, room_around


class Noisy:
    """Draws noise everywhere, a function of variation and step; keeps what it was shown."""

    def __init__(self, size: tuple[int, int] = (16, 16), token: int = 4) -> None:
        self.size, self.token = size, token
        self.seen: list[tuple[np.ndarray, np.ndarray, tuple[int, ...], int]] = []

    def paint(self, images: Any, region: Any, variations: Sequence[int], step: int) -> Any:
        assert images.shape == (len(variations), *self.size, 3) and images.dtype == np.uint8
        assert region.shape == self.size and region.min() >= 0 and region.max() <= 1
        self.seen.append((images, region, tuple(variations), step))
        drawn = [np.random.default_rng([v, step]).uniform(0, 255, (*self.size, 3)) for v in variations]
        return np.stack(drawn).astype(np.float32)

    def reconstruct(self, image: Any) -> Any:
        return 255 - image

    def views(self, region: Any) -> Sequence[TokenView]:
        return [TokenView("tokens", region[::4, ::4], region[::4, ::4] > 0)]


class Shifted(Noisy):
    """Draws what it was shown, with other colours, and white in the region."""

    def paint(self, images: Any, region: Any, variations: Sequence[int], step: int) -> Any:
        super().paint(images, region, variations, step)
        shifted = images.astype(np.float32) + np.float32([10, -8, 4])
        return np.where(region[None, :, :, None] > 0, np.float32(120), shifted).clip(0, 255)


def random_picture(rng: np.random.Generator, height: int, width: int) -> Picture:
    kind = rng.integers(0, 4)
    colour = rng.integers(0, 256, (height, width, 1 if kind == 1 else 3)).astype(np.uint8)
    if kind == 2:
        return Picture(colour, rng.integers(0, 256, (height, width)).astype(np.uint8))
    if kind == 3:
        return Picture(rng.integers(0, 1 << 16, (height, width, 1)).astype(np.uint16))
    return Picture(colour)


def near(region: np.ndarray, feather: int) -> np.ndarray:
    """Pixels of the region and within `feather` of it, in steps of a king; by hand, not as the package finds them."""
    found = np.zeros(region.shape, bool)
    for y, x in np.argwhere(region > 0):
        found[max(0, y - feather) : y + feather + 1, max(0, x - feather) : x + feather + 1] = True
    return found


def test_pixels_outside_the_feathered_region_are_untouched() -> None:
    rng = np.random.default_rng(0)
    for _ in range(250):
        height, width = (int(v) for v in rng.integers(1, 70, 2))
        picture = random_picture(rng, height, width)
        before = picture.copy()
        boxes = []
        for _ in range(rng.integers(1, 4)):
            left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
            boxes.append((left, top, int(rng.integers(left, width)) + 1, int(rng.integers(top, height)) + 1))
        region = box_region((height, width), boxes)
        if rng.random() < 0.3:
            region[region > 0] = rng.integers(1, 256, int((region > 0).sum()))  # soft
        feather = int(rng.integers(0, 10))
        model = (16, 16) if rng.random() < 0.7 else (12, 20)
        plan = plan_region(picture, region, model, feather=feather)
        flags = {"match": bool(rng.random() < 0.5), "erase": bool(rng.random() < 0.5)}
        outside = ~near(region, feather)
        for _, result in edit_picture(plan, Noisy(model), range(2), together=2, **flags):
            assert result.colour.dtype == before.colour.dtype and result.size == before.size
            assert (result.colour[outside] == before.colour[outside]).all()
            if before.alpha is not None:
                assert result.alpha is not None and (result.alpha == before.alpha).all()
            inside = region == 255
            if inside.sum() > 50:
                assert (result.colour[inside] != before.colour[inside]).mean() > 0.8
        assert (picture.colour == before.colour).all()


def test_the_picture_on_a_larger_canvas_is_untouched_but_for_the_feather() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        height, width = (int(v) for v in rng.integers(10, 40, 2))
        picture = random_picture(rng, height, width)
        margins = [Length(float(v), False) for v in rng.integers(0, 50, 4) * (rng.random(4) < 0.6)]
        if not any(m.value for m in margins):
            continue
        room, feather = room_around((height, width), margins), int(rng.integers(0, 4))
        plan = plan_room(picture, room, (16, 16), feather=feather, overlap=float(rng.choice([0.25, 0.5])))
        ((_, result),) = edit_picture(plan, Noisy(), range(1), match=bool(rng.random() < 0.5))
        outside = ~near(plan.region, feather)
        assert result.size == room.size
        assert (result.colour[outside] == plan.canvas.colour[outside]).all()
        new = result.colour[plan.region > 0]
        assert (new != 0).any(axis=-1).mean() > 0.9  # every window was drawn
        if result.alpha is not None:
            assert (result.alpha[plan.region > 0] == 255).all()


def test_variations_do_not_depend_on_how_many_are_drawn_together(monkeypatch: Any) -> None:
    picture = Picture(np.full((20, 20, 3), 77, np.uint8))
    plan = plan_room(picture, room_around((20, 20), [Length(16, False)] * 4), (16, 16))
    assert len(plan.windows) > 8
    one, three = (list(edit_picture(plan, Noisy(), range(5), together=n)) for n in (1, 3))
    assert [i for i, _ in one] == [i for i, _ in three] == [0, 1, 2, 3, 4]
    for (_, a), (_, b) in zip(one, three, strict=True):
        assert (a.colour == b.colour).all()
    assert (one[0][1].colour != one[1][1].colour).any()
    monkeypatch.setattr(editing, "LIMIT", 2 * 52 * 52)
    painter, done = Noisy(), []
    assert len(list(edit_picture(plan, painter, range(5), together=5, advance=done.append))) == 5
    assert max(len(numbers) for _, _, numbers, _ in painter.seen) == 2  # no more canvases than fit
    assert sum(done) == 5 * len(plan.windows)


def test_each_window_sees_what_was_drawn_before() -> None:
    picture = Picture(np.full((16, 16, 3), 77, np.uint8))
    plan = plan_room(picture, room_around((16, 16), canvas=(16, 64)), (16, 16), feather=0)
    painter = Noisy()
    list(edit_picture(plan, painter, range(1), match=False))
    places = [window.left for window in plan.windows]
    assert sorted(places) == [0, 8, 16, 32, 40, 48]
    first = places.index(32)
    second = places.index(40)
    drawn = np.random.default_rng([0, first]).uniform(0, 255, (16, 16, 3)).astype(np.float32)
    images, region, _, _ = painter.seen[second]
    assert (region[:, :8] == 0).all() and (region[:, 8:] == 1).all()
    assert (images[0, :, :7] == drawn[:, 8:15].round()).all()  # but for the rim, which is drawn again
    assert (images[0, :, 7] != drawn[:, 15].round()).any()


def test_what_is_erased_is_not_seen() -> None:
    colour = np.full((16, 16, 3), 50, np.uint8)
    colour[4:8, 4:8] = 250
    region = box_region((16, 16), [(4, 4, 8, 8)])
    for erase, most in ((True, 50), (False, 250)):
        painter = Noisy()
        list(edit_picture(plan_region(Picture(colour), region, (16, 16)), painter, range(1), erase=erase))
        assert painter.seen[0][0].max() == most


def test_a_full_region_shows_the_picture_and_takes_all_that_is_drawn() -> None:
    picture = Picture(np.full((16, 16, 3), 50, np.uint8))
    painter = Noisy()
    plan = plan_region(picture, np.full((16, 16), 255, np.uint8), (16, 16))
    ((_, result),) = edit_picture(plan, painter, range(1), erase=True)
    assert (painter.seen[0][0] == 50).all() and (painter.seen[0][1] == 1).all()
    drawn = np.random.default_rng([0, 0]).uniform(0, 255, (16, 16, 3)).astype(np.float32)
    assert (result.colour == drawn.round()).all()


def test_a_shift_of_colours_leaves_no_seam() -> None:
    picture = Picture(np.full((64, 64, 3), 120, np.uint8))
    plan = plan_region(picture, box_region((64, 64), [(20, 20, 44, 44)]), (64, 64), feather=4)

    def error(match: bool) -> int:
        class Constant(Shifted):
            def paint(self, images: Any, region: Any, variations: Sequence[int], step: int) -> Any:
                return images.astype(np.float32) + np.float32([10, -8, 4])

        ((_, result),) = edit_picture(plan, Constant((64, 64)), range(1), match=match)
        return int(np.abs(result.colour.astype(int) - 120).max())

    assert error(False) == 10 and error(True) == 0


def test_default_feathers_follow_the_window() -> None:
    picture = Picture(np.zeros((400, 400, 3), np.uint8))
    assert plan_region(picture, box_region((400, 400), [(0, 0, 100, 100)]), (16, 16)).feather == 200 // 32
    assert plan_region(picture, box_region((400, 400), [(0, 0, 9, 9)]), (16, 16)).feather == 1


def test_sheets_and_previews_show_everything() -> None:
    picture = Picture(np.random.default_rng(0).integers(0, 256, (20, 40, 3)).astype(np.uint8))
    plan = plan_room(picture, room_around((20, 40), canvas=(20, 120)), (16, 16))
    painter = Noisy()
    again = reconstruction(plan, painter)
    left, top, right, bottom = bounds(255 - plan.region)
    changed = (again.colour != plan.canvas.colour).any(axis=-1)
    assert (
        changed[top:bottom, left:right].any() and not changed[:, :left].any() and not changed[:, right:].any()
    )
    results = [result for _, result in edit_picture(plan, painter, range(2))]
    assert sheet(plan, again, results).height > 5 * 40  # a panorama has a row to itself
    views = window_views(plan, painter)
    assert len(views) == len(plan.windows) and all(view[2][0].drawn.any() for view in views)
    assert preview(plan, views).width == 2 * 160 + 6


def shows(sheet: np.ndarray, part: np.ndarray, left: int) -> bool:
    """Whether a sheet shows a part, pixel for pixel, from some row and a column on."""
    height, width = part.shape[:2]
    columns = sheet[:, left : left + width]
    return any((columns[top : top + height] == part).all() for top in range(len(sheet) - height + 1))


def test_sheets_show_windows_at_full_size_or_enlarged() -> None:
    picture = Picture(np.random.default_rng(0).integers(0, 256, (900, 1200, 3)).astype(np.uint8))
    boxes = [(100, 100, 300, 300), (1000, 700, 1020, 720)]
    plan = plan_region(picture, box_region(picture.size, boxes), (16, 16))
    places = sorted((window.inside(picture.size) for window in plan.windows), key=lambda each: each[0].start)
    results = [result for _, result in edit_picture(plan, Noisy(), range(2))]
    found = np.asarray(sheet(plan, reconstruction(plan, Noisy()), results))
    for place, factor in zip(places, (1, 8), strict=True):
        for number, each in enumerate([picture, *results]):
            part = each.colour[place].repeat(factor, axis=0).repeat(factor, axis=1)
            assert shows(found, part, number * (part.shape[1] + 6)), (place, number)


def test_sheets_show_no_window_that_is_all_of_a_small_picture() -> None:
    picture = Picture(np.zeros((16, 16, 3), np.uint8))
    plan = plan_region(picture, box_region((16, 16), [(4, 4, 12, 12)]), (16, 16))
    assert sheet(plan, reconstruction(plan, Noisy()), [picture]).height < 3 * editing.TILE  # two rows


def test_sheets_reduce_what_is_very_large() -> None:
    picture = Picture(np.zeros((2000, 3000, 1), np.uint8))
    plan = plan_region(picture, np.full(picture.size, 255, np.uint8), (16, 16))
    size = sheet(plan, reconstruction(plan, Noisy()), [picture]).size
    assert size[0] == 2 * editing.CLOSE + 6 and size[1] < 1200


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (300, 7), (700, 900)])
def test_sheets_of_odd_sizes(size: tuple[int, int]) -> None:
    picture = Picture(np.zeros((*size, 1), np.uint8))
    plan = plan_region(picture, np.full(size, 255, np.uint8), (16, 16))
    image = sheet(plan, reconstruction(plan, Noisy()), [picture])
    assert image.width > 100 and image.height > 20
    assert preview(plan, window_views(plan, Noisy())).width > 300


def test_sheets_of_slivers() -> None:
    for size, box in (((8, 20000), (5000, 2, 5020, 6)), ((20000, 8), (2, 19990, 6, 20000))):
        picture = Picture(np.zeros((*size, 3), np.uint8))
        plan = plan_region(picture, box_region(size, [box]), (16, 16))
        assert sheet(plan, reconstruction(plan, Noisy()), [picture]).height > 0
        assert preview(plan, window_views(plan, Noisy())).width > 300


def test_windows_that_are_too_large_are_refused() -> None:
    long = Picture(np.zeros((8, 20000, 1), np.uint8))
    with pytest.raises(UserError, match="the window that shows the region: 20000 x 20000 pixels are more"):
        plan_region(long, np.full(long.size, 255, np.uint8), (16, 16))
    room = room_around((8, 20000), [Length(8, False)] * 4)
    with pytest.raises(UserError, match="a window: 9000 x 9000 pixels are more"):
        plan_room(long, room, (16, 16), height=9000)

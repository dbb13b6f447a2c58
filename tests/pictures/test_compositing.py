"""Colours that are matched around a region, and blending that leaves the rest to the bit."""

import numpy as np
import pytest

from hmar_cli.pictures.compositing import extend, fit, match_colours, paste
from hmar_cli.pictures.picture import Picture


def test_a_membrane_keeps_what_is_known_and_is_harmonic_between() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        height, width = (int(v) for v in rng.integers(1, 40, 2))
        values = rng.normal(size=(height, width, 2)).astype(np.float32)
        known = rng.random((height, width)) < rng.choice([0.02, 0.3, 0.9])
        result = extend(values, known)
        assert result.shape == values.shape and result.dtype == np.float32
        assert (result[known] == values[known]).all()
        if known.any():
            low, high = values[known].min(axis=0) - 1e-5, values[known].max(axis=0) + 1e-5
            assert ((result >= low) & (result <= high)).all()
        else:
            assert (result == 0).all()


@pytest.mark.parametrize("side", [16, 33, 64])
def test_a_membrane_over_a_hole_continues_a_slope(side: int) -> None:
    rows, columns = np.indices((side, side), dtype=np.float32)
    plane = np.stack([rows, 2 * columns - rows], axis=-1) / side  # is harmonic
    known = np.ones((side, side), bool)
    known[side // 4 : -side // 4, side // 4 : -side // 4] = False
    assert np.abs(extend(np.where(known[..., None], plane, 9), known) - plane).max() < 0.02


def test_a_shift_of_colours_is_removed_in_the_region_too() -> None:
    rng = np.random.default_rng(0)
    original = rng.integers(60, 180, (64, 64, 3), np.uint8)
    region = np.zeros((64, 64), np.float32)
    region[20:45, 24:40] = 1
    wanted = original.astype(np.float32)
    wanted[20:45, 24:40] = rng.integers(60, 180, (25, 16, 3))  # new content
    columns = np.arange(64, dtype=np.float32)[None, :, None]
    shifted = wanted + np.array([12, -9, 5]) + 0.1 * columns
    matched = match_colours(shifted.astype(np.float32), original, region, 4)
    inside = np.s_[20:45, 24:40]
    assert np.abs(shifted[inside] - wanted[inside]).mean() > 6
    assert np.abs(matched[inside] - wanted[inside]).max() < 0.6


def test_new_content_is_no_shift() -> None:
    """Tokens that the region touches may differ as they like: the ring lies beside them."""
    original = np.full((32, 32, 3), 100, np.uint8)
    region = np.zeros((32, 32), np.float32)
    region[9:23, 9:23] = 1
    drawn = original.astype(np.float32)
    drawn[8:24, 8:24] = 200  # whole tokens of 4 pixels
    assert np.abs(match_colours(drawn, original, region, 4) - drawn).max() < 1e-3


def test_nothing_is_matched_where_nothing_is_known() -> None:
    drawn = np.random.default_rng(0).uniform(0, 255, (8, 8, 3)).astype(np.float32)
    original = np.zeros((8, 8, 3), np.uint8)
    assert (match_colours(drawn, original, np.ones((8, 8), np.float32), 2) == drawn).all()


@pytest.mark.parametrize("kind", ["grey", "deep", "colour", "clear"])
def test_paste_blends_by_weight_and_leaves_the_rest(kind: str) -> None:
    rng = np.random.default_rng(0)
    channels = 3 if kind in ("colour", "clear") else 1
    old = rng.integers(0, 256, (30, 40, channels)).astype(np.uint8)
    if kind == "deep":
        old = rng.integers(0, 1 << 16, (30, 40, 1)).astype(np.uint16)
    alpha = rng.integers(0, 256, (30, 40)).astype(np.uint8) if kind == "clear" else None
    picture = Picture(old, alpha).copy()
    drawn = np.repeat(rng.integers(0, 256, (10, 12, 1)).astype(np.uint8), 3, axis=2)
    weight = rng.choice(np.array([0, 1, 128, 255], np.uint8), (10, 12))
    paste(picture, (slice(5, 15), slice(20, 32)), drawn, weight)
    w = weight[..., None] / 255
    part = old[5:15, 20:32]
    expected = w * drawn[..., :channels] * (257.0 if kind == "deep" else 1) + (1 - w) * part
    result = picture.colour[5:15, 20:32]
    assert np.abs(result - expected).max() <= 0.51
    assert (result[weight == 0] == part[weight == 0]).all()
    outside = np.ones((30, 40), bool)
    outside[5:15, 20:32] = False
    assert (picture.colour[outside] == old[outside]).all()
    if alpha is not None:
        assert picture.alpha is not None and (picture.alpha == alpha).all()


def test_fit_changes_nothing_at_the_same_size() -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert fit(drawn, 8, 8) is drawn
    assert fit(drawn, 16, 12).shape == (16, 12, 3)

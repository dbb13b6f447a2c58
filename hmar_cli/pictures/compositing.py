"""How what a model drew is put back: its colours matched to the picture around it, then blended by weights.

Letters: H W the picture's rows and columns; h w the model's; C channels.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from hmar_cli.pictures.picture import Picture, Pixels, bands

SWEEPS = 24
"""Relaxations of the membrane at each level of its pyramid."""

Floats = npt.NDArray[np.float32]


def extend(values: Floats, known: npt.NDArray[np.bool_]) -> Floats:
    """Continue known values smoothly into the unknown, as a membrane that hangs on them does.

    Laplace's equation is solved from coarse to fine: each level starts from the one above it and is relaxed. The
    picture's edges are free.

    Args:
        values: [H, W, C]; numbers at unknown places do not count.
        known: [H, W].

    Returns:
        [H, W, C], the known values unchanged; zeros where nothing at all is known.
    """
    if known.all():
        return values
    if not known.any():
        return np.zeros_like(values)
    height, width = known.shape
    padding = ((0, height % 2), (0, width % 2))
    weight: Floats = np.pad(known.astype(np.float32), padding)
    summed: Floats = np.pad(np.where(known[..., None], values, np.float32(0)), (*padding, (0, 0)))
    count = _blocks(weight[..., None])[..., 0]
    means: Any = _blocks(summed) / np.maximum(count, 0.25)[..., None]  # means of the known pixels of 2 x 2
    coarse = extend(means, count > 0)
    result = np.where(known[..., None], values, coarse.repeat(2, axis=0).repeat(2, axis=1)[:height, :width])
    for _ in range(SWEEPS):
        around = np.pad(result, ((1, 1), (1, 1), (0, 0)), mode="edge")
        mean = (around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]) / 4
        result = np.where(known[..., None], values, mean)
    return result.astype(np.float32)


def _blocks(x: Floats) -> Floats:
    """Means of 2 x 2 pixels of [H, W, C] with even sides."""
    height, width, channels = x.shape
    means: Floats = x.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3), dtype=np.float32)
    return means


def match_colours(drawn: Floats, original: Pixels, region: Floats, token: int) -> Floats:
    """Remove the shift of colours that a tokenizer brings, as it shows around the region.

    Around the region the model drew what it was shown, so a difference there is the tokenizer's doing. Differences
    are taken from a ring one token wide beside the tokens of the region, smoothed over about a token, extended into
    the region as a membrane, and added.

    Args:
        drawn: [h, w, 3], 0 to 255, what the model drew.
        original: [h, w, 3], what it was shown.
        region: [h, w], above 0 where it was to draw.
        token: pixels along a token's side.

    Returns:
        [h, w, 3], 0 to 255; `drawn` where there is nothing around the region.
    """
    near = _touched(region, token)
    ring = _around(near, token) & ~near
    if not ring.any():
        return drawn
    difference = np.where(ring[..., None], original.astype(np.float32) - drawn, np.float32(0))
    share = _mean(ring.astype(np.float32)[..., None], token)
    smooth: Any = _mean(difference, token) / np.maximum(share, 1e-6)
    matched: Floats = (drawn + extend(smooth, ring)).clip(0, 255)
    return matched


def _touched(region: Floats, token: int) -> npt.NDArray[np.bool_]:
    """Pixels of all tokens that the region touches; the grid starts at the corner."""
    height, width = region.shape
    padded = np.pad(region > 0, ((0, -height % token), (0, -width % token)))
    rows, columns = padded.shape[0] // token, padded.shape[1] // token
    tokens = padded.reshape(rows, token, columns, token).any(axis=(1, 3))
    return tokens.repeat(token, axis=0).repeat(token, axis=1)[:height, :width]


def _around(mask: npt.NDArray[np.bool_], radius: int) -> npt.NDArray[np.bool_]:
    """The mask and all within `radius` of it, in a square."""
    return _mean(mask.astype(np.float32)[..., None], radius)[..., 0] > 0.1 / (2 * radius + 1) ** 2


def _mean(x: Floats, radius: int) -> Floats:
    """Means over squares of `radius` around each pixel of [H, W, C]; zeros outside."""
    width = 2 * radius + 1
    for axis in (0, 1):
        padding = [(radius + 1, radius) if each == axis else (0, 0) for each in range(3)]
        total = np.cumsum(np.pad(x, padding), axis=axis, dtype=np.float64)
        upper = np.take(total, range(width, total.shape[axis]), axis=axis)
        x = ((upper - np.take(total, range(total.shape[axis] - width), axis=axis)) / width).astype(np.float32)
    return x


def paste(
    picture: Picture,
    place: tuple[slice, slice],
    drawn: Pixels,
    weight: Pixels,
) -> None:
    """Blend what was drawn into a picture, in place; where the weight is 0, its pixels stay as they are, to the bit.

    Grey pictures take the brightness. Transparency is not touched.

    Args:
        picture: with pixels of its own.
        place: rows and columns of the picture.
        drawn: [H, W, 3] for that place.
        weight: [H, W], 255 takes what was drawn.
    """
    target: Any = picture.colour[place]
    deep = target.dtype == np.uint16
    for rows in bands(weight.shape):
        new: Any = drawn[rows]
        if target.shape[2] == 1:
            new = np.asarray(Image.fromarray(new).convert("L"))[..., None]
        w = weight[rows, :, None].astype(np.uint32)
        new = new.astype(np.uint32) * (257 if deep else 1)
        old = target[rows].astype(np.uint32)
        target[rows] = (w * new + (255 - w) * old + 127) // 255  # below 2^24


def fit(drawn: Pixels, height: int, width: int) -> Pixels:
    """Resize what was drawn, [h, w, 3], to a window's pixels."""
    if drawn.shape[:2] == (height, width):
        return drawn
    resized: Pixels = np.asarray(Image.fromarray(drawn).resize((width, height), Image.Resampling.LANCZOS))
    return resized

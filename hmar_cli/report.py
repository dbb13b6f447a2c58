"""Pictures for people: image grids and curves."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hmar_cli.files import atomic_file


def to_uint8(images: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Turn images [B, 3, H, W] in [-1, 1] into [B, H, W, 3] uint8, rounding to the nearest level."""
    scaled = images.float().clamp(-1, 1).add(1).mul(127.5).round()
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def image_grid(
    images: Tensor | Sequence[np.ndarray[Any, Any]], columns: int = 0, gap: int = 2
) -> Image.Image:
    """Lay images out row by row on white.

    Args:
        images: [B, 3, H, W] in [-1, 1], or uint8 arrays [H, W, 3] of one size.
        columns: images a row; 0 makes the grid about square.
        gap: pixels between images.

    Raises:
        ValueError: no images.
    """
    tiles = list(to_uint8(images)) if isinstance(images, Tensor) else list(images)
    if not tiles:
        raise ValueError("expected at least one image")
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles[0].shape[:2]
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    canvas = Image.new("RGB", size, "white")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        canvas.paste(Image.fromarray(tile), (column * (width + gap), row * (height + gap)))
    return canvas


def save_png(image: Image.Image, target: Path) -> None:
    """Write a PNG file that is either complete or absent."""
    with atomic_file(target) as temporary:
        image.save(temporary, format="PNG")

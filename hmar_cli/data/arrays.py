"""Images as one array in an `.npz` file, as ADM's evaluator reads and writes them (Dhariwal & Nichol 2021).

`arr_0` is uint8 (N, H, W, 3); rows are read as they are needed, so that 50 000 images of 512 px never lie in memory.

Letters: N images, H W their rows and columns.
"""

import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from PIL import Image

from hmar_cli.data.images import UNLABELLED, Example, ImageSource
from hmar_cli.errors import UserError

MEMBER = "arr_0.npy"
HINT = "ADM's files hold images as `arr_0`, uint8 (N, H, W, 3); `hmar sample --npz` writes one"


class ArraySource(ImageSource):
    """Images of an array inside an `.npz` file, read from its start to its end; it has no labels."""

    def __init__(self, path: Path, shape: tuple[int, int, int, int]) -> None:
        super().__init__(str(path), UNLABELLED, shape[0])
        self.path, self.shape = path, shape

    def example(self, index: int) -> Example:
        """Read up to one image."""
        return next(self.deferred(index, index + 1))()

    def deferred(self, start: int, stop: int) -> Iterator[Callable[[], Example]]:
        """Yield functions that make images of rows of the array.

        Raises:
            UserError: the file ends early or is broken.
        """
        size = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(MEMBER) as file:
                _read_header(file)
                file.seek(start * size, 1)
                for index in range(start, min(stop, self.shape[0])):
                    row = file.read(size)
                    if len(row) != size:
                        raise EOFError(f"image {index} is cut off")
                    yield partial(_example, index, np.frombuffer(row, np.uint8).reshape(self.shape[1:]))
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {self.path}: {error}", "copy the file again") from error


def _example(index: int, pixels: npt.NDArray[np.uint8]) -> Example:
    return Example(index, Image.fromarray(pixels))


def open_arrays(path: Path) -> ArraySource:
    """Open the images of an `.npz` file.

    Raises:
        UserError: no such file, another format, or no images in it.
    """
    if not path.is_file():
        raise UserError(f"no file {path}", HINT)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(MEMBER) as file:
            shape, dtype, by_column = _read_header(file)
    except KeyError as error:
        raise UserError(f"{path} holds no array arr_0", HINT) from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}", HINT) from error
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or by_column or not all(shape):
        raise UserError(f"arr_0 of {path} is {dtype} {shape}", HINT)
    return ArraySource(path, (shape[0], shape[1], shape[2], 3))


def _read_header(file: Any) -> tuple[tuple[int, ...], "np.dtype[Any]", bool]:
    """Shape, type, and whether columns come first; leaves the file at the array's first byte."""
    version = npy.read_magic(file)
    reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_column, dtype = reader(file)
    return shape, dtype, by_column

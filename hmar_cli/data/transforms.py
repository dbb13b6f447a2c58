"""From a picture of any size to a training image: the centre crop of ADM, and VAR's resize-and-crop.

Letters: H W the size asked for; images are uint8 arrays (rows, columns, 3).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from hmar_cli.models.scales import Side

if TYPE_CHECKING:
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]
Crop = Literal["adm", "var"]
ENLARGE = 1.125  # VAR resizes the short side to this multiple of the crop


def height_width(size: Side) -> tuple[int, int]:
    """Rows and columns of a size as a recipe writes it: a side, or [height, width]."""
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if height < 1 or width < 1:
        raise ValueError(f"expected a positive size, got {size}")
    return height, width


@dataclass(frozen=True)
class ImageTransform:
    """Cuts pictures to one size, in two steps, so that the first can be done once and kept.

    Attributes:
        size: (H, W).
        crop: "adm" scales the picture to cover the size and takes the middle (Dhariwal & Nichol 2021, ADM:
            halved with a box filter while it can be, then bicubic); "var" scales it to cover 1.125 times the
            size with Lanczos (VAR section 5) and takes a window.
        train: whether "var" takes a random window, rather than the middle.
    """

    size: tuple[int, int]
    crop: Crop
    train: bool

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Pixels:
        """Return a (H, W, 3) image; `rng` chooses the window where it is random.

        Raises:
            ValueError: a random window, and nothing to choose it.
        """
        if not self.random:
            return middle(self.resized(image), self.size)
        if rng is None:
            raise ValueError("expected a generator of random numbers for a random window, got None")
        return self.window(self.resized(image), *map(float, rng.random(2)))

    @property
    def random(self) -> bool:
        """Whether the window is a matter of chance."""
        return self.train and self.crop == "var"

    def resized(self, image: Image.Image) -> Pixels:
        """Return the scaled picture, at least (H, W, 3): exactly that for "adm"."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        if self.crop == "adm":
            return middle(np.asarray(_adm_resize(image, self.size)), self.size)
        return np.asarray(_var_resize(image, self.size))

    def window(self, pixels: Pixels, down: float, right: float) -> Pixels:
        """Cut (H, W, 3) from a scaled picture; `down` and `right` in [0, 1) choose among all places.

        Without chance (`random` is False) the middle is cut, whatever the place.
        """
        if not self.random:
            return middle(pixels, self.size)
        (rows, columns, _), (height, width) = pixels.shape, self.size
        top = min(int(down * (rows - height + 1)), rows - height)
        left = min(int(right * (columns - width + 1)), columns - width)
        return pixels[top : top + height, left : left + width]


def image_transform(size: Side, crop: Crop, *, train: bool) -> ImageTransform:
    """Make the transform of a recipe's `[data]`.

    Raises:
        ValueError: a crop other than "adm" and "var", or a size that is not positive.
    """
    if crop not in ("adm", "var"):
        raise ValueError(f"expected the crop 'adm' or 'var', got {crop!r}")
    return ImageTransform(height_width(size), crop, train)


def to_tensor(pixels: "Pixels | Tensor") -> "Tensor":
    """Turn uint8 images (N, H, W, 3) into float32 (N, 3, H, W) in [-1, 1]."""
    import torch

    tensor = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[-1] != 3:
        raise ValueError(f"expected uint8 (N, H, W, 3), got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)  # N H W 3 -> N 3 H W


def shrink(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Make images smaller: the pictures whose tokens are Hi-MAR's pivots.

    Args:
        pixels: (N, H, W, 3), uint8.
        size: (h, w), no larger.

    Returns:
        (N, h, w, 3), uint8, rounded: the mean of whole blocks of pixels where h, w divide H, W, else PIL's
        bicubic filter, which is antialiased.

    Raises:
        ValueError: a size that is larger.
    """
    (rows, columns), (height, width) = pixels.shape[1:3], size
    if not (0 < height <= rows and 0 < width <= columns):
        raise ValueError(f"expected a size within {rows} x {columns}, got {height} x {width}")
    down, right = rows // height, columns // width
    whole = (down * height, right * width) == (rows, columns)
    small = np.empty((len(pixels), height, width, 3), np.uint8)
    for i, each in enumerate(pixels):
        image = Image.fromarray(each)
        smaller = (
            image.reduce((right, down)) if whole else image.resize((width, height), Image.Resampling.BICUBIC)
        )
        small[i] = np.asarray(smaller)
    return small


def middle(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Cut the central (H, W, 3)."""
    (rows, columns), (height, width) = pixels.shape[:2], size
    top, left = (rows - height) // 2, (columns - width) // 2
    return pixels[top : top + height, left : left + width]


def _adm_resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    target = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    return image.resize(target, Image.Resampling.BICUBIC)


def _var_resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = round(ENLARGE * size[0]), round(ENLARGE * size[1])
    if width * image.height >= height * image.width:  # the width decides
        target = (width, max(int(width * image.height / image.width), height))
    else:
        target = (max(int(height * image.width / image.height), width), height)
    return image.resize(target, Image.Resampling.LANCZOS)

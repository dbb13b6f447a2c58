"""A user's picture, read without loss and written as PNG.

The pixels stay what they are: a grey picture stays grey, 16 bits stay 16 bits, transparency stays. What a model sees
of it is RGB with 8 bits on white.

Letters: H W rows and columns; c colour channels, 1 (grey) or 3 (RGB).
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from hmar_cli.console import console
from hmar_cli.errors import UserError, first_line

LIMIT = 1 << 26
"""Most pixels of a picture, a mask or a canvas: 8192 x 8192."""

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""What is read, by content. PIL knows more, among them PostScript, for which it would start a program."""

Pixels = npt.NDArray[np.uint8]
Colour = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Picture:
    """A picture, upright.

    Attributes:
        colour: [H, W, c]; uint8, or uint16 for a grey picture of 16 bits.
        alpha: [H, W], 255 is opaque; None where nothing is transparent.
        profile: what its colours mean (an ICC profile); None where the file does not say.
    """

    colour: Colour
    alpha: Pixels | None = None
    profile: bytes | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.colour.shape[0], self.colour.shape[1]

    def copy(self) -> "Picture":
        """A picture with pixels of its own, to be written into."""
        return Picture(self.colour.copy(), None if self.alpha is None else self.alpha.copy(), self.profile)

    def seen(self, rows: slice, columns: slice) -> Pixels:
        """What a model sees of a part: [h, w, 3] on white."""
        part: Any = self.colour[rows, columns]
        if part.dtype == np.uint16:
            part = (part >> 8).astype(np.uint8)
        if part.shape[2] == 1:
            part = part.repeat(3, axis=2)  # h w 1 -> h w 3
        return part if self.alpha is None else _on_white(part, self.alpha[rows, columns])

    def on_canvas(self, size: tuple[int, int], top: int, left: int) -> "Picture":
        """Put the picture on a larger canvas, which is opaque and black around it.

        Args:
            size: (H, W) of the canvas.
            top: row of the picture's first row.
            left: column of its first column.

        Raises:
            ValueError: the picture is not within the canvas.
        """
        height, width = self.size
        if top < 0 or left < 0 or top + height > size[0] or left + width > size[1]:
            raise ValueError(f"expected {self.size} at ({top}, {left}) within {size}")
        place = np.s_[top : top + height, left : left + width]
        colour = np.zeros((*size, self.colour.shape[2]), self.colour.dtype)
        colour[place] = self.colour
        if self.alpha is None:
            return Picture(colour, None, self.profile)
        alpha = np.full(size, 255, np.uint8)
        alpha[place] = self.alpha
        return Picture(colour, alpha, self.profile)

    def image(self) -> Image.Image:
        """The picture for PIL: L, LA, RGB, RGBA or I;16."""
        colour: Any = self.colour[..., 0] if self.colour.shape[2] == 1 else self.colour
        image = Image.fromarray(colour)
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        if self.profile:
            image.info["icc_profile"] = self.profile
        return image


def _on_white(colour: Pixels, alpha: Pixels) -> Pixels:
    """Lay [h, w, 3] with transparency over white, a band of rows at a time."""
    result = np.empty_like(colour)
    for rows in bands(colour.shape):
        a = alpha[rows, :, None].astype(np.uint16)
        result[rows] = (colour[rows] * a + 255 * (255 - a) + 127) // 255  # at most 255 * 255 + 127 < 2^16
    return result


def bands(shape: tuple[int, ...], most: int = 1 << 20) -> list[slice]:
    """Share rows into bands of about `most` pixels, so that what is computed of them stays small."""
    step = max(1, most // max(1, shape[1]))
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def check_size(height: int, width: int, what: str) -> None:
    """Refuse what is larger than `LIMIT`.

    Raises:
        UserError: it is.
    """
    if height * width > LIMIT:
        raise UserError(
            f"{what}: {width} x {height} pixels are more than the {LIMIT} that can be edited",
            "make it smaller, or edit a part that you cut out",
        )


def read_image(path: Path) -> Image.Image:
    """Decode the first frame of a file, upright; its size is checked before its pixels are read.

    Raises:
        UserError: a file that is missing, unreadable, or larger than `LIMIT`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such picture", "check the spelling of the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            Image.init()
            image = Image.open(path, formats=[each for each in FORMATS if each in Image.OPEN])
            check_size(image.height, image.width, str(path))
            deep = ";16" in str([tile[3] for tile in image.tile])  # as the file has it
            image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {error}", f"at most {LIMIT} pixels can be edited") from error
    except Exception as error:  # codecs raise what they like about broken data
        raise UserError(
            f"{path}: not a readable picture ({first_line(error)})", "give a PNG, JPEG or WebP file"
        ) from error
    if deep and image.mode in ("RGB", "RGBA", "LA"):
        console.print(f"warning: {path}: of its 16 bits a colour 8 are read", highlight=False)
    return image


def read_picture(path: Path) -> Picture:
    """Read a picture: orientation applied, palettes resolved, CMYK and other colours as RGB.

    PNG files with 16 bits a colour are read with 8, as PIL does; grey ones keep theirs.

    Raises:
        UserError: a file that is missing, unreadable, too large, or of numbers that are no colours.
    """
    image = read_image(path)
    profile = image.info.get("icc_profile")
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return Picture(_deep(np.asarray(image), path)[..., None], None, profile)
    plain = {"1": "L", "La": "LA", "P": "RGB", "PA": "RGBA", "RGBa": "RGBA"}
    mode = plain.get(image.mode, image.mode)
    if "transparency" in image.info:
        mode = {"L": "LA", "RGB": "RGBA"}.get(mode, mode)
    if mode not in ("L", "LA", "RGB", "RGBA"):
        mode, profile = "RGB", None  # the profile is that of the other colours
    image = image if image.mode == mode else image.convert(mode)
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        return Picture(pixels[..., None], None, profile)
    if mode in ("LA", "RGBA"):
        return Picture(pixels[..., :-1], pixels[..., -1], profile)
    return Picture(pixels, None, profile)


def _deep(values: Any, path: Path) -> npt.NDArray[np.uint16]:
    """Grey values of 16 bits, which older versions of PIL give as 32."""
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
        raise UserError(
            f"{path}: its numbers are no colours of 8 or 16 bits", "convert it to a common PNG first"
        )
    found: npt.NDArray[np.uint16] = values.astype(np.uint16)
    return found

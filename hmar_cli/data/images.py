"""What a source of images gives: examples, in order or by index; and how one image is decoded."""

import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hmar_cli.errors import UserError

UNLABELLED = ("image",)
"""Class names of a source without labels: every image is of one class."""


@dataclass(frozen=True)
class Example:
    """One image of a source.

    Attributes:
        index: its place in the source.
        image: RGB, upright; None if it cannot be used.
        label: index into the source's class names.
        captions: its texts; none where the source has none for it.
        error: why the image cannot be used, empty if it can.
    """

    index: int
    image: Image.Image | None
    label: int = 0
    captions: tuple[str, ...] = ()
    error: str = ""

    @property
    def caption(self) -> str:
        """The first caption; empty if there is none."""
        return self.captions[0] if self.captions else ""

    @property
    def fault(self) -> str:
        """Which image cannot be used, and why; empty if it can."""
        return f"image {self.index}: {self.error}" if self.image is None else ""


def class_places(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Find each class of `names` in the `known` ones: its place there, -1 where it has none.

    A name that several of the known classes share, as two of ImageNet's are called crane, says which one is meant
    only where both lists are the same.
    """
    if tuple(names) == tuple(known):
        return list(range(len(known)))
    counts = Counter(known)
    places = {name: place for place, name in enumerate(known) if counts[name] == 1}
    return [places.get(name, -1) for name in names]


class ImageSource(ABC):
    """A sequence of images with labels and captions.

    Attributes:
        name: the spelling that opened it.
        class_names: one name a label.
        length: how many images there are; None if a stream does not say.
        captioned: whether its images have captions.
    """

    def __init__(
        self, name: str, class_names: Sequence[str], length: int | None, *, captioned: bool = False
    ) -> None:
        self.name, self.class_names, self.length = name, tuple(class_names), length
        self.captioned = captioned

    @property
    def random_access(self) -> bool:
        """Whether images can be read in any order; a stream is read from its start."""
        return True

    @abstractmethod
    def example(self, index: int) -> Example:
        """Decode one image of a source that is no stream; called in any thread."""

    def deferred(self, start: int, stop: int) -> Iterator[Callable[[], Example]]:
        """Yield for each of the images [start, stop) a function that decodes it, to be called in any thread.

        Ends early where the source ends.
        """
        for index in range(start, min(stop, len(self))):
            yield partial(self.example, index)

    def read(self, start: int, stop: int) -> Iterator[Example]:
        """Yield the images [start, stop) in order; ends early where the source ends."""
        for decode in self.deferred(start, stop):
            yield decode()

    def pick(self, indices: Sequence[int]) -> Iterator[Callable[[], Example]]:
        """Yield for each of some images a function that decodes it, to be called in any thread.

        Raises:
            UserError: the source is a stream.
        """
        count = len(self)
        for index in indices:
            if not 0 <= index < count:
                raise IndexError(f"expected an index below {count}, got {index}")
            yield from self.deferred(index, index + 1)

    def captions(self, index: int) -> tuple[str, ...]:
        """The texts of one image; sources that know them without its pixels read no more than that."""
        return self[index].captions

    def __len__(self) -> int:
        if self.length is None or not self.random_access:
            raise UserError(
                f"{self.name} is a stream: its images cannot be counted or read in any order",
                "leave out streaming=true, or make a cache of it with `hmar tokenize`",
            )
        return self.length

    def __getitem__(self, index: int) -> Example:
        return next(self.pick([index]))()


def decode_image(value: Any) -> Image.Image:
    """Decode one image to upright RGB; transparent pixels show white.

    Args:
        value: encoded bytes, a path, a mapping with `bytes` or `path`, or an image.

    Raises:
        Exception: whatever the codec says about broken data.
    """
    if isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ValueError("no image")
    if isinstance(value, str) and "://" in value:  # an address inside a streamed data set
        import datasets

        value = datasets.Image().decode_example({"path": value, "bytes": None})
    image = value if isinstance(value, Image.Image) else Image.open(_readable(value))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # 16 bits: PIL would clip them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _readable(value: Any) -> Any:
    return io.BytesIO(value) if isinstance(value, bytes | bytearray) else value


def unusable(index: int, error: Exception | str) -> Example:
    """An image that cannot be used, with the reason in one line."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Example(index, None, error=" ".join(text.split()))

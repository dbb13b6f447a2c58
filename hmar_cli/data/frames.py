"""Images of a source for a network that takes several sizes: cut, in batches, by several processes.

Letters: B images of a batch, H W their height and width.
"""

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from hmar_cli.console import progress
from hmar_cli.data.ahead import ordered_map
from hmar_cli.data.images import Example, ImageSource
from hmar_cli.data.transforms import Crop, Pixels, image_transform, middle
from hmar_cli.errors import UserError
from hmar_cli.models.scales import Side


def as_tensor(images: Sequence[Pixels]) -> Tensor:
    """Arrays [H, W, 3] uint8 of one size as a tensor [B, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # B H W 3 -> B 3 H W


@dataclass
class FramedImages:
    """Images of a source, cut for a tokenizer and in batches; images that cannot be read are left out.

    Iterating shows a bar, in the first process.

    Attributes:
        source: the images; a stream is fine.
        stride: of the tokenizer.
        size: to which images are scaled and cut; None leaves each at its own size, less what the stride does not
            divide, which is cut off around the middle. Only images of one size, that follow one another, share a
            batch.
        crop: how they are scaled and cut.
        count: of the first images; 0 is all.
        batch_size: images at once.
        workers: threads that decode.
        share: this process and how many there are; each takes its part of the batches.
        unreadable: images left out by this process.
        error: why the first of them was.
        sizes: how many images there were of each height and width.
    """

    source: ImageSource
    stride: int
    size: Side | None
    crop: Crop = "adm"
    count: int = 0
    batch_size: int = 32
    workers: int = 2
    share: tuple[int, int] = (0, 1)
    unreadable: int = 0
    error: str = ""
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches [B, 3, H, W] uint8.

        Raises:
            UserError: an image that is smaller than the stride.
        """
        cut, (rank, world) = self._cut(), self.share
        total = min(self.count or sys.maxsize, self.source.length or sys.maxsize)

        def decode(deferred: Callable[[], Example]) -> tuple[Example, Pixels | None]:
            example = deferred()
            return example, None if example.image is None else cut(example)

        chunks = enumerate(_chunks(self.source.deferred(0, total), self.batch_size))
        mine = (deferred for place, chunk in chunks if place % world == rank for deferred in chunk)
        length = None if total == sys.maxsize else math.ceil(total / world)
        title = "reconstructing" if world == 1 else f"reconstructing (one of {world} processes)"
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(progress(title, length)) if rank == 0 else None
            examples = ordered_map(decode, mine, self.workers)
            while chunk := list(islice(examples, self.batch_size)):
                if bar is not None:
                    bar.advance(len(chunk))
                self._note([example for example, pixels in chunk if pixels is None])
                yield from map(as_tensor, self._alike([pixels for _, pixels in chunk if pixels is not None]))

    def gather(self) -> None:
        """Join what all processes noted, where there are several."""
        if not distributed.is_initialized():
            return
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, (self.unreadable, self.error, self.sizes))
        self.unreadable = sum(bad for bad, _, _ in found)
        self.error = next((error for _, error, _ in found if error), "")
        self.sizes = dict(sum((Counter(sizes) for _, _, sizes in found), Counter[tuple[int, int]]()))

    def _cut(self) -> Callable[[Example], Pixels]:
        if self.size is not None:
            transform, rng = image_transform(self.size, self.crop, train=False), np.random.default_rng(0)
            return lambda example: transform(example.image, rng)  # type: ignore[arg-type]

        def native(example: Example) -> Pixels:
            assert example.image is not None
            width, height = example.image.size
            inside = height // self.stride * self.stride, width // self.stride * self.stride
            if not all(inside):
                raise UserError(
                    f"image {example.index} of {self.source.name} is {width} x {height}, smaller than a token",
                    "scale all images to one size: --size N",
                )
            return middle(np.asarray(example.image), inside)

        return native

    def _alike(self, images: Sequence[Pixels]) -> Iterator[list[Pixels]]:
        """Runs of images of one size."""
        run: list[Pixels] = []
        for image in images:
            height, width = image.shape[:2]
            self.sizes[height, width] = self.sizes.get((height, width), 0) + 1
            if run and run[0].shape != image.shape:
                yield run
                run = []
            run.append(image)
        if run:
            yield run

    def _note(self, bad: Sequence[Example]) -> None:
        self.unreadable += len(bad)
        self.error = self.error or (f"image {bad[0].index}: {bad[0].error}" if bad else "")


def _chunks(items: Iterable[Callable[[], Example]], size: int) -> Iterator[list[Callable[[], Example]]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk

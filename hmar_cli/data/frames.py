"""Images of a source for a network that takes several sizes: cut, in batches, by several processes.

Letters: B images of a batch, H W their height and width.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hmar_cli.data.images import Example, ImageSource
from hmar_cli.data.sharing import Share, gather, shared_batches
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
        workers: threads that decode; 0 for one a processor, up to 16.
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
    workers: int = 0
    share: Share = (0, 1)
    unreadable: int = 0
    error: str = ""
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches [B, 3, H, W] uint8.

        Raises:
            UserError: an image that is smaller than the stride.
        """
        cut = self._cut()

        def decode(example: Example) -> tuple[str, Pixels | None]:
            return example.fault, None if example.image is None else cut(example)

        for batch in shared_batches(
            self.source,
            decode,
            title="reconstructing",
            count=self.count,
            batch_size=self.batch_size,
            workers=self.workers,
            share=self.share,
        ):
            faults = [fault for fault, pixels in batch if pixels is None]
            self.unreadable += len(faults)
            self.error = self.error or next(iter(faults), "")
            yield from map(as_tensor, self._alike([pixels for _, pixels in batch if pixels is not None]))

    def gather(self) -> None:
        """Join what all processes noted, where there are several."""
        found = gather((self.unreadable, self.error, self.sizes))
        self.unreadable = sum(bad for bad, _, _ in found)
        self.error = next((error for _, error, _ in found if error), "")
        self.sizes = dict(sum((Counter(sizes) for _, _, sizes in found), Counter[tuple[int, int]]()))

    def _cut(self) -> Callable[[Example], Pixels]:
        if self.size is not None:
            transform = image_transform(self.size, self.crop, train=False)
            return lambda example: transform(example.image)  # type: ignore[arg-type]

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

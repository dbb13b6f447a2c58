"""Endless batches in a fixed order: each is a function of its number, so that a run can go on anywhere.

Epoch e goes through a permutation seeded by (seed, e). Micro-step m of all processes together takes the m-th
`world * batch_size` places of it, process r the r-th `batch_size` of those; places left over at the end of an
epoch are dropped. Crops, mirroring, views and captions are random by (seed, epoch, index).
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hmar_cli.console import warn
from hmar_cli.data.ahead import prefetch
from hmar_cli.data.cache import Array, Cache
from hmar_cli.data.images import Example, ImageSource
from hmar_cli.data.transforms import Crop, Pixels, image_transform
from hmar_cli.errors import UserError
from hmar_cli.models.scales import Side

if TYPE_CHECKING:
    from torch import Tensor

Indices = npt.NDArray[np.int64]
ORDER, VIEW, PLACE, MIRROR, CAPTION = range(5)  # what random numbers are for
FETCH = 4096  # images gathered from a cache at once
FETCH_BYTES = 32 << 20  # and how many bytes they may have, unless one batch has more
THREADED = 4096  # bytes of an image from which on a thread reads ahead
KEEP = 2 << 30  # bytes of scaled images kept in memory


def epoch_length(count: int, global_micro_batch: int) -> int:
    """Micro-batches in an epoch.

    Args:
        count: images.
        global_micro_batch: images of one micro-batch over all processes.

    Raises:
        UserError: fewer images than one micro-batch.
    """
    if count < global_micro_batch:
        raise UserError(
            f"{count} images are fewer than the {global_micro_batch} of one batch",
            f"take more images, or --set train.batch_size={count} or less",
        )
    return count // global_micro_batch


def order(
    count: int, *, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, Indices]]:
    """Yield (epoch, indices (batch_size,)) of one process, from micro-step `start` on, without end."""
    everyone = batch_size * world
    length = epoch_length(count, everyone)
    epoch, places = -1, np.empty(0, np.int64)
    for step in itertools.count(start):
        if step // length != epoch:
            epoch = step // length
            places = np.random.default_rng([seed, epoch, ORDER]).permutation(count)
        first = step % length * everyone + rank * batch_size
        yield epoch, places[first : first + batch_size]


def cache_batches(
    cache: Cache,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    mirror: bool = True,
) -> "Iterator[dict[str, Tensor]]":
    """Yield batches of a cache without end, each image in a random view and with a random caption.

    The view is the same in all arrays that have views; the caption is chosen by itself.

    Args:
        cache: the cache.
        batch_size: images of a batch.
        seed: of order, views and captions.
        start: micro-step to begin with.
        rank: which process this is.
        world: how many processes there are.
        mirror: whether mirrored views are taken too, where the cache has them.

    Yields:
        "label" and "index", int64 (b,), and one row an image of each array of the cache: whole numbers
        ("tokens" (b, L), ids of "text" (b, T)) as int64, half floats ("moments" (b, 2Z, h, w), "pivot_moments",
        embeddings of "text" (b, T, W)) as float32.
    """
    import torch

    steps = order(len(cache), batch_size=batch_size, seed=seed, start=start, rank=rank, world=world)
    stored = _stored_batches(cache, steps, batch_size, seed, mirror)
    # small rows are read much faster than a model takes them; a thread would only delay them
    for batch in prefetch(stored, 4) if cache.row_bytes > THREADED else stored:
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        # here, not ahead: in a thread of its own torch would start a second team of OpenMP threads
        yield {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
        }


def _stored_batches(
    cache: Cache, steps: Iterator[tuple[int, Indices]], batch_size: int, seed: int, mirror: bool
) -> Iterator[dict[str, Array]]:
    """Batches with floating-point numbers as they are stored."""
    images = min(FETCH, FETCH_BYTES // cache.row_bytes)
    epoch = -1
    while True:
        block = list(itertools.islice(steps, max(1, images // batch_size)))
        chosen: dict[str, list[Indices]] = {"view": [], "caption": []}
        for number, indices in block:
            if number != epoch:
                epoch, rows = number, _row_choice(cache, seed, number, mirror)
            for per, found in chosen.items():
                found.append(rows[per][indices])
        every = np.concatenate([indices for _, indices in block])
        picked = {per: np.concatenate(found) for per, found in chosen.items()}
        arrays = {name: cache.fetch(name, every, picked[cache.per(name)]) for name in cache.manifest.arrays}
        for place, (_, indices) in enumerate(block):
            part = slice(place * batch_size, (place + 1) * batch_size)
            batch = {name: array[part] for name, array in arrays.items()}
            whole = {name: a.astype(np.int64) for name, a in batch.items() if a.dtype.kind != "f"}
            yield batch | whole | {"label": cache.labels[indices], "index": indices.copy()}


def _row_choice(cache: Cache, seed: int, epoch: int, mirror: bool) -> dict[str, Indices]:
    """The "view" and the "caption" of every image in an epoch, (count,) each."""
    step = 2 if cache.manifest.mirror and not mirror else 1  # mirrored views are the odd ones
    views = np.random.default_rng([seed, epoch, VIEW]).integers(cache.manifest.views // step, size=len(cache))
    captions = np.random.default_rng([seed, epoch, CAPTION]).integers(
        max(cache.manifest.captions, 1), size=len(cache)
    )
    return {"view": views * step, "caption": captions}


def image_batches(
    source: ImageSource,
    *,
    size: Side,
    crop: Crop,
    mirror: bool,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
) -> "Iterator[dict[str, Tensor]]":
    """Yield batches of images without end, cropped and mirrored at random.

    Scaled images are kept in memory up to 2 GiB, so that small data is decoded once. In the place of an image
    that cannot be used the next one is taken, with one warning.

    Args:
        source: the images; not a stream.
        size: of a training image.
        crop: "adm" or "var".
        mirror: whether half of the images are mirrored.
        batch_size: images of a batch.
        seed: of order, crops and mirroring.
        start: micro-step to begin with.
        rank: which process this is.
        world: how many processes there are.
        workers: threads that decode images.

    Yields:
        {"image": uint8 (b, 3, H, W), "label": int64 (b,), "index": int64 (b,), "used": int64 (b,)}; the last two
        differ where another image was taken

    Raises:
        UserError: a stream, too few images for a batch, or none that can be used.
    """
    steps = order(len(source), batch_size=batch_size, seed=seed, start=start, rank=rank, world=world)
    return prefetch(_image_batches(_Pictures(source, size, crop, workers), steps, seed, mirror), 2)


def _image_batches(
    pictures: "_Pictures", steps: Iterator[tuple[int, Indices]], seed: int, mirror: bool
) -> "Iterator[dict[str, Tensor]]":
    import torch

    count, epoch = pictures.count, -1
    for number, indices in steps:
        if number != epoch:
            epoch = number
            places = np.random.default_rng([seed, epoch, PLACE]).random((count, 2))
            mirrored = np.random.default_rng([seed, epoch, MIRROR]).random(count) < 0.5 * mirror
        scaled = pictures.get(indices)
        batch = np.empty((len(indices), *pictures.transform.size, 3), np.uint8)
        for i, (index, (picture, *_)) in enumerate(zip(indices, scaled, strict=True)):
            batch[i] = pictures.transform.window(picture, places[index, 0], places[index, 1])
        flip = np.flatnonzero(mirrored[indices])
        batch[flip] = batch[flip][:, :, ::-1]
        yield {
            # b H W 3 -> b 3 H W by numpy: torch would start a second team of OpenMP threads here, and two
            # teams on the same cores slow each other (and training on a CPU) down by half
            "image": torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))),
            "label": torch.tensor([label for _, label, _ in scaled]),
            "index": torch.from_numpy(indices.copy()),
            "used": torch.tensor([used for _, _, used in scaled]),
        }


_Picture = tuple[Pixels, int, int]
"""A scaled image, its label and its index."""


class _Pictures:
    """Scaled images by index, decoded by threads and kept while there is room."""

    def __init__(self, source: ImageSource, size: Side, crop: Crop, workers: int) -> None:
        self.source, self.count = source, len(source)
        self.transform = image_transform(size, crop, train=True)
        self._pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="hmar-decode")
        self._kept: dict[int, _Picture] = {}
        self._room = KEEP
        self._warned = False

    def get(self, indices: Indices) -> list[_Picture]:
        """Return the scaled pictures of `indices`, or what takes their places."""
        missing = [index for index in indices.tolist() if index not in self._kept]
        fresh = dict(zip(missing, self._pool.map(self._scaled, self.source.pick(missing)), strict=True))
        for index, picture in fresh.items():
            if picture[0].nbytes <= self._room:
                self._room -= picture[0].nbytes
                self._kept[index] = picture
        return [fresh.get(index) or self._kept[index] for index in indices.tolist()]

    def _scaled(self, decode: Callable[[], Example]) -> _Picture:
        """Decode an image and scale it; where it cannot be used, the next one that can."""
        example = decode()
        start = example.index
        for place in itertools.chain(range(start + 1, self.count), range(start + 1)):
            if example.image is not None:
                return self.transform.resized(example.image), example.label, example.index
            self._warn(example)
            example = self.source[place]
        raise UserError(f"no image of {self.source.name} could be used")

    def _warn(self, example: Example) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"image {example.index} of {self.source.name} cannot be used, so the next "
                f"one takes its place; others are replaced alike, and counted ({example.error})"
            )

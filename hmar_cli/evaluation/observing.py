"""Going through a set of images once: what an extractor saw is kept, the images are not.

Several processes can share the work: batch b is that of process b modulo their number, so that every batch holds the
images that a single process would put into it, and `gather` brings the parts together.

Letters: N images of the set, B of a batch, H W rows and columns, F pooled features, C classes.
"""

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hmar_cli.data import sharing
from hmar_cli.data.frames import as_tensor
from hmar_cli.data.images import Example, ImageSource, class_places
from hmar_cli.data.sharing import Share, own_share, shared_batches, shared_progress
from hmar_cli.data.transforms import Crop, ImageTransform, Pixels, height_width, image_transform
from hmar_cli.errors import UserError
from hmar_cli.evaluation.extractors import Extractor
from hmar_cli.evaluation.frechet import FeatureStatistics
from hmar_cli.models.scales import Side

METRICS = ("fid", "sfid", "is", "kid", "precision", "recall")
"""What can be measured; see `measures`."""

NEEDS_FEATURES = frozenset({"kid", "precision", "recall"})
"""Metrics that compare images one by one, so that the features of each are kept."""


@dataclass(kw_only=True)
class Observations:
    """What an extractor saw in a set of images, or what a file of statistics says of one.

    Attributes:
        source: spelling of the set, or path of the file.
        extractor: as `Extractor.describe` has it.
        standard: whether it is the Inception that papers use.
        count: images measured; 0 where a file does not say.
        size: (H, W) of what the extractor was given; None where it is unknown.
        crop: "adm", "var", or "none" for images as they were.
        digest: SHA-256 of the set, see `set_digest`; of the file where that does not say.
        statistics: of the pooled features.
        spatial: of the spatial features, if a metric needs them.
        features: [N, F], float32, on the CPU, in the order of the images, if a metric needs them.
        logits: [N, C], float32, on the CPU, likewise.
        labelled: whether each class of the set is one of the extractor's.
        right: images that the extractor assigns to their own class, if so.
        unreadable: images that could not be read, which count nowhere else.
        enlarged: images that were smaller than what the extractor was given: blurred ones, which move every number.
        error: why the first of them could not.
        shown: the first images [H, W, 3], at most `showing`.
        showing: how many of them were asked for.
        seconds: that looking took, with whatever made the images meanwhile.
        indices: [N] int64, places of the measured images in the set; their order is that of the features.
        digests: SHA-256 of each of them.
    """

    source: str
    extractor: dict[str, Any]
    standard: bool = False
    count: int = 0
    size: tuple[int, int] | None = None
    crop: str = "none"
    digest: str = ""
    statistics: FeatureStatistics = field(default_factory=FeatureStatistics)
    spatial: FeatureStatistics | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    labelled: bool = False
    right: int = 0
    unreadable: int = 0
    enlarged: int = 0
    error: str = ""
    shown: list[Pixels] = field(default_factory=list)
    showing: int = 0
    seconds: float = 0.0
    indices: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    digests: list[bytes] = field(default_factory=list)

    @property
    def extractor_name(self) -> str:
        """Name of the extractor."""
        return str(self.extractor["name"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the extractor's weights."""
        return str(self.extractor["fingerprint"])

    def describe(self) -> dict[str, Any]:
        """The set as JSON has it."""
        accuracy = {"right": self.right, "accuracy": self.right / max(self.count, 1)} if self.labelled else {}
        return {
            "source": self.source,
            "sha256": self.digest,
            "count": self.count or None,
            "unreadable": self.unreadable,
            "size": None if self.size is None else list(self.size),
            "crop": self.crop,
            **accuracy,
        }


def image_digest(pixels: Pixels) -> bytes:
    """SHA-256 over "H W " in decimal and the pixels [H, W, 3] of an image."""
    return hashlib.sha256(b"%d %d " % pixels.shape[:2] + pixels.tobytes()).digest()


def set_digest(digests: Sequence[bytes]) -> str:
    """Name a set of images, as the extractor is given them, by the SHA-256 over the sorted SHA-256 of each.

    Order, file format, batches and processes change nothing.
    """
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def observe(
    source: ImageSource | Iterable[Tensor],
    extractor: Extractor,
    *,
    metrics: Sequence[str] = ("fid",),
    size: Side | None = None,
    crop: Crop = "adm",
    count: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    labels: Sequence[str] | None = None,
    shown: int = 0,
    name: str = "",
    title: str = "looking at images",
    share: Share = (0, 1),
) -> Observations:
    """Look at images in their order, a batch at a time; a bar shows how far it is, images a second and the ETA.

    Args:
        source: the images; a stream is fine. Or tensors of them, uint8 [B, 3, H, W], on any device.
        extractor: what looks at them.
        metrics: of `METRICS`, all that will be measured: they decide what is kept.
        size: to which images are scaled and cropped; None for the extractor's, or else for images as they are,
            which must then be of one size.
        crop: how, as for training: "adm" or "var" with its middle.
        count: of the first images; 0 is all.
        batch_size: images of a source at once; tensors come as they are.
        workers: threads that decode; 0 for one a processor, up to 16.
        labels: names of the classes of images that come as tensors; that of image i is the i-th, modulo their number.
        shown: of the first images that are kept as they are.
        name: of images that come as tensors, for the record.
        title: of the bar.
        share: this process and how many there are: see `gather`.

    Raises:
        ValueError: an unknown metric, or tensors that are no images.
        UserError: images of several sizes where no size is given, or an extractor that has no features that a
            metric needs.
    """
    if unknown := [each for each in metrics if each not in METRICS]:
        raise ValueError(f"expected metrics of {METRICS}, got {unknown[0]!r}")
    wanted = size if size is not None else extractor.size
    cut = None if wanted is None else image_transform(wanted, crop, train=False)
    observer = _Observer(extractor, metrics, cut, shown)
    if isinstance(source, ImageSource):
        observer.name_classes(source.class_names)
        observer.found.source = source.name
        batches = shared_batches(
            source,
            observer.read,
            title=title,
            count=count,
            batch_size=batch_size,
            workers=workers,
            share=share,
        )
    else:
        observer.name_classes(tuple(dict.fromkeys(labels or ())))
        observer.found.source = name
        batches = _batches_of_tensors(source, count, observer.prepare, labels or (), title, share)
    start = time.perf_counter()
    with contextlib.closing(batches):
        for batch in batches:
            observer.add(batch)
    return observer.finish(time.perf_counter() - start)


@dataclass
class _Prepared:
    """One image, ready for the extractor.

    Attributes:
        index: its place in the set.
        label: place of its class in the set's class names.
        pixels: [H, W, 3]; None if it cannot be used.
        digest: SHA-256 of its pixels.
        error: why it cannot be used.
        enlarged: whether it was smaller than its pixels.
    """

    index: int
    label: int = 0
    pixels: Pixels | None = None
    digest: bytes = b""
    error: str = ""
    enlarged: bool = False


def _batches_of_tensors(
    source: Iterable[Tensor],
    count: int,
    prepare: Callable[[int, int, Image.Image], _Prepared],
    labels: Sequence[str],
    title: str,
    share: Share,
) -> Generator[list[_Prepared], None, None]:
    """This process's batches of tensors; all processes are given all of them."""
    (rank, world), total, first = share, count or sys.maxsize, 0
    places = {each: place for place, each in enumerate(dict.fromkeys(labels))}
    own = math.ceil(count / world) if count else None  # about: batches may be of any size
    with shared_progress(title, own, share) as bar:
        for number, tensor in enumerate(source):
            if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[1] != 3:
                raise ValueError(f"expected uint8 [B, 3, H, W], got {tensor.dtype} {list(tensor.shape)}")
            rows = tensor[: total - first].permute(0, 2, 3, 1).cpu().numpy()  # B 3 H W -> B H W 3
            if number % world == rank and len(rows):
                yield [
                    prepare(i, places[labels[i % len(labels)]] if labels else 0, Image.fromarray(row))
                    for i, row in enumerate(rows, first)
                ]
                bar.advance(len(rows))
            first += len(rows)
            if first >= total:
                return


class _Observer:
    """Observations in the making."""

    def __init__(
        self, extractor: Extractor, metrics: Sequence[str], cut: ImageTransform | None, shown: int
    ) -> None:
        self.extractor, self.metrics, self.cut = extractor, metrics, cut
        self.found = Observations(source="", extractor=extractor.describe(), standard=extractor.standard)
        self.found.showing = shown
        self.found.crop = "none" if cut is None else cut.crop
        self.found.size = None if cut is None else height_width(cut.size)
        self.labels: list[int] = []
        self.features: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.indices: list[int] = []

    def name_classes(self, names: Sequence[str]) -> None:
        """Say which classes the set has."""
        self.labels = class_places(names, self.extractor.class_names)
        self.found.labelled = bool(self.labels) and min(self.labels) >= 0

    def read(self, example: Example) -> _Prepared:
        """Prepare an image of a source, if it can be used; called in any thread."""
        if example.image is None:
            return _Prepared(example.index, error=example.fault)
        return self.prepare(example.index, example.label, example.image)

    def prepare(self, index: int, label: int, image: Image.Image) -> _Prepared:
        """Cut an image to size and take its digest; called in any thread."""
        pixels = np.asarray(image) if self.cut is None else self.cut(image)
        smaller = image.height < pixels.shape[0] or image.width < pixels.shape[1]
        return _Prepared(index, label, pixels, image_digest(pixels), enlarged=smaller)

    def add(self, batch: Sequence[_Prepared]) -> None:
        """Look at a batch."""
        found = self.found
        bad = [each for each in batch if each.pixels is None]
        found.unreadable += len(bad)
        found.enlarged += sum(each.enlarged for each in batch)
        found.error = found.error or (bad[0].error if bad else "")
        good = [(each, each.pixels) for each in batch if each.pixels is not None]
        if not good:
            return
        self._require_one_size(good)
        pooled, spatial, logits = self.extractor(as_tensor([each for _, each in good]))
        found.statistics.add(pooled)
        if "sfid" in self.metrics:
            found.spatial = found.spatial or FeatureStatistics()
            found.spatial.add(_require(spatial, "sfid", self.extractor))
        if "is" in self.metrics:
            self.logits.append(_require(logits, "is", self.extractor).cpu())
        if NEEDS_FEATURES & set(self.metrics):
            self.features.append(pooled.cpu())
        if found.labelled and logits is not None:
            own = [self.labels[each.label] for each, _ in good]
            found.right += int((logits.argmax(dim=1).cpu() == torch.tensor(own)).sum())
        self.indices += [each.index for each, _ in good]
        found.digests += [each.digest for each, _ in good]
        found.shown += [each for _, each in good][: found.showing - len(found.shown)]

    def _require_one_size(self, good: Sequence[tuple[_Prepared, Pixels]]) -> None:
        for each, pixels in good:
            height, width = pixels.shape[:2]
            self.found.size = self.found.size or (height, width)
            if (height, width) != self.found.size:
                first, this = (f"{w} x {h}" for h, w in (self.found.size, (height, width)))
                raise UserError(
                    f"images of several sizes in {self.found.source}: {first}, and image {each.index} is {this}",
                    "say to which size they are to be scaled and cropped: --size",
                )

    def finish(self, seconds: float) -> Observations:
        """All that was found."""
        found = self.found
        found.count, found.seconds = found.statistics.count, seconds
        found.labelled = found.labelled and bool(self.extractor.class_names)
        found.indices = torch.tensor(self.indices, dtype=torch.int64)
        found.digest = set_digest(found.digests)
        found.features = torch.cat(self.features) if self.features else None
        found.logits = torch.cat(self.logits) if self.logits else None
        return found


def require_features(extractor: Extractor, metrics: Sequence[str], size: Side) -> None:
    """See by one grey image that an extractor works and has what metrics need, before there are any others.

    Args:
        extractor: to try.
        metrics: of `METRICS`.
        size: of the images to come, if the extractor takes any.

    Raises:
        UserError: it fails, or has no features that a metric needs.
    """
    grey = torch.full((1, 3, *height_width(extractor.size or size)), 128, dtype=torch.uint8)  # 1 3 H W
    _, spatial, logits = extractor(grey)
    for metric, part in (("sfid", spatial), ("is", logits)):
        if metric in metrics:
            _require(part, metric, extractor)


def _require(part: Tensor | None, metric: str, extractor: Extractor) -> Tensor:
    if part is None:
        wants = "Inception's spatial features" if metric == "sfid" else "logits of classes"
        raise UserError(f"{metric} needs {wants}, which {extractor.name} has not", f"leave {metric} out")
    return part


def gather(found: Observations) -> Observations:
    """Bring together what the processes of `torch.distributed` found; with one process, return it.

    Each process must have looked with `share=(its number, how many there are)`. What is returned is the same on every
    one: that of a single process, but for rounding in the last digits of float64 statistics.
    """
    if own_share()[1] == 1:
        return found
    found.statistics = found.statistics.cpu()
    found.spatial = None if found.spatial is None else found.spatial.cpu()
    return join(sharing.gather(found))


def join(parts: Sequence[Observations]) -> Observations:
    """One set of several parts of it, in the order of the images."""
    whole = Observations(**{**vars(parts[0]), "statistics": FeatureStatistics(), "spatial": None})
    whole.size = next((part.size for part in parts if part.size is not None), None)
    for part in parts:
        if part.count and part.size != whole.size:
            raise UserError(f"images of several sizes in {whole.source}", "say to which size: --size")
        whole.statistics.join(part.statistics)
        if part.spatial is not None:
            whole.spatial = whole.spatial or FeatureStatistics()
            whole.spatial.join(part.spatial)
    whole.count = whole.statistics.count
    indices = torch.cat([part.indices for part in parts])
    order = indices.argsort(stable=True)
    whole.indices = indices[order]
    for name in ("features", "logits"):
        rows = [part for part in (getattr(each, name) for each in parts) if part is not None]
        setattr(whole, name, torch.cat(rows)[order] if rows else None)
    digests = [digest for part in parts for digest in part.digests]
    whole.digests = [digests[i] for i in order.tolist()]
    whole.digest = set_digest(digests)
    for name in ("right", "unreadable", "enlarged"):
        setattr(whole, name, sum(getattr(part, name) for part in parts))
    whole.error = min((part.error for part in parts if part.error), key=_image_number, default="")
    shown = [(int(i), each) for part in parts for i, each in zip(part.indices, part.shown, strict=False)]
    whole.shown = [each for _, each in sorted(shown, key=lambda pair: pair[0])][: whole.showing]
    whole.seconds = max(part.seconds for part in parts)
    return whole


def _image_number(error: str) -> int:
    """Of an error "image 12: ...", 12."""
    return int(error.removeprefix("image ").partition(":")[0])


def observe_together(
    source: ImageSource | Iterable[Tensor], extractor: Extractor, **settings: Any
) -> Observations:
    """`observe` by all processes of `torch.distributed`, where it is initialised, and `gather`."""
    return gather(observe(source, extractor, share=own_share(), **settings))

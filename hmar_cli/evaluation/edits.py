"""How well regions of held-out pictures are filled: a model beside fills that know less, or more.

A fill gets a picture and a region of it; what it puts there is judged against the original. Outside the region every
filled picture is the original, to the bit. Images and masks depend on the source and the seed alone, so that numbers
of several models compare.

Letters: N pictures, B of a batch, H W rows and columns, F features.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from hmar_cli.console import progress
from hmar_cli.data.frames import as_tensor
from hmar_cli.data.images import ImageSource, class_places
from hmar_cli.data.transforms import Pixels, image_transform
from hmar_cli.errors import UserError
from hmar_cli.evaluation.extractors import Extractor
from hmar_cli.evaluation.frechet import FeatureStatistics
from hmar_cli.models.scales import Side

MASKS = ("centre", "half", "free-form")
"""Regions: the middle half of each side, the right half, and random strokes, others for every picture."""

HIGHEST = 60.0
"""PSNR in dB that counts where a fill is the original, or next to it."""

STROKES = 256
"""Shorter side of the canvas on which strokes are drawn, for regions that are alike at every size."""

Fill = Callable[[Sequence[int], Pixels, Pixels], Pixels]
"""Of the numbers of B pictures, the pictures [B, H, W, 3] and a region [H, W] (255 or 0): pictures [B, H, W, 3]."""


@dataclass(frozen=True)
class HeldOut:
    """Pictures that no model saw in training.

    Attributes:
        source: its spelling.
        pixels: [N, H, W, 3].
        labels: N places in `class_names`.
        class_names: one name a label.
        captions: N texts, empty where there is none.
        unreadable: images of the source that could not be read, and are not among the N.
        error: why the first of them could not.
    """

    source: str
    pixels: Pixels
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    captions: tuple[str, ...]
    unreadable: int = 0
    error: str = ""


def read_held_out(source: ImageSource, size: Side, count: int) -> HeldOut:
    """Read the first pictures of a source, scaled and centre-cropped to the size of a model as ADM does.

    Raises:
        UserError: fewer than two that can be read.
    """
    cut = image_transform(size, "adm", train=False)
    examples = list(source.read(0, count))
    good = [(each, each.image) for each in examples if each.image is not None]
    bad = [each.fault for each in examples if each.image is None]
    if len(good) < 2:
        raise UserError(
            f"{source.name} has {len(good)} images that can be read; a measurement needs 2 or more",
            bad[0] if bad else "give more images",
        )
    return HeldOut(
        source=source.name,
        pixels=np.stack([cut(image) for _, image in good]),
        labels=tuple(each.label for each, _ in good),
        class_names=source.class_names,
        captions=tuple(each.caption for each, _ in good),
        unreadable=len(bad),
        error=bad[0] if bad else "",
    )


def region_of(mask: str, size: tuple[int, int], seed: int, number: int) -> Pixels:
    """The region of picture `number` by the name of its mask: [H, W] uint8, 255 where it is filled, else 0.

    Only "free-form" depends on seed and number.

    Raises:
        ValueError: a mask that is none of `MASKS`.
    """
    if mask not in MASKS:
        raise ValueError(f"expected a mask of {MASKS}, got {mask!r}")
    if mask == "free-form":
        return _strokes(size, np.random.default_rng([seed, number]))
    (height, width), region = size, np.zeros(size, np.uint8)
    if mask == "centre":
        region[height // 4 : height - height // 4, width // 4 : width - width // 4] = 255
    else:
        region[:, width // 2 :] = 255
    return region


def _strokes(size: tuple[int, int], rng: np.random.Generator) -> Pixels:
    """Thick bent strokes until they cover 15 to 40 % of the picture, or a little more."""
    factor = STROKES / min(size)
    height, width = (round(side * factor) for side in size)
    canvas, wanted = Image.new("L", (width, height)), rng.uniform(0.15, 0.4)
    pen = ImageDraw.Draw(canvas)
    while np.asarray(canvas).mean() < 255 * wanted:
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        angle, thick = rng.uniform(0, 2 * math.pi), rng.uniform(0.06, 0.14) * STROKES
        for _ in range(rng.integers(2, 6)):
            angle += rng.uniform(-1.2, 1.2)
            length = rng.uniform(0.1, 0.3) * STROKES
            ahead = x + length * math.cos(angle), y + length * math.sin(angle)
            pen.line([(x, y), ahead], 255, round(thick))
            x, y = (min(max(v, 0.0), float(most)) for v, most in zip(ahead, (width, height), strict=True))
            pen.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), 255)
    small = np.asarray(canvas.resize((size[1], size[0]), Image.Resampling.BOX))
    region: Pixels = np.where(small >= 128, np.uint8(255), np.uint8(0))
    return region


def yardsticks(held_out: HeldOut, seed: int) -> dict[str, Fill]:
    """Fills that know nothing of what pictures look like.

    "mean colour" fills with the mean of what is kept. "another picture" fills with the same region of a picture that
    seed and number choose among the others: what chance would do.
    """

    def mean_colour(numbers: Sequence[int], pictures: Pixels, region: Pixels) -> Pixels:
        means = pictures[:, region == 0].mean(axis=1).round()  # [B, 3]
        return np.broadcast_to(means[:, None, None].astype(np.uint8), pictures.shape)

    def another_picture(numbers: Sequence[int], pictures: Pixels, region: Pixels) -> Pixels:
        return held_out.pixels[[_other(number, len(held_out.pixels), seed) for number in numbers]]

    return {"mean colour": mean_colour, "another picture": another_picture}


def _other(number: int, count: int, seed: int) -> int:
    """One of `count` pictures, each but `number` with the same chance."""
    place = int(np.random.default_rng([seed, number, 1]).integers(count - 1))
    return place + (place >= number)


def psnr(filled: Pixels, original: Pixels, region: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of [H, W, 3] within the region [H, W], at most `HIGHEST`."""
    inside = region > 0
    error = np.square(filled[inside].astype(np.float64) - original[inside]).mean()
    return 10 * math.log10(255**2 / max(error, 255**2 * 10 ** (-HIGHEST / 10)))


def seam(picture: Pixels, region: Pixels) -> float:
    """Mean step, in levels of 0 to 255, between neighbours of [H, W, 3] on the two sides of a region's edge."""
    inside, colours = region > 0, picture.astype(np.float64)
    steps = []
    for axis in (0, 1):
        crossing = np.diff(inside, axis=axis)  # [H - 1, W] or [H, W - 1]
        steps.append(np.abs(np.diff(colours, axis=axis))[crossing])
    return float(np.concatenate(steps).mean())


@dataclass
class Row:
    """What one fill does with one mask.

    Attributes:
        mask: of `MASKS`.
        fill: its name.
        psnrs: of each picture.
        distances: Euclidean distance of each filled picture's features from those of the original; none without an
            extractor.
        frechet: Fréchet distance of the filled pictures' features from those of the originals; None without one.
        seams: of each filled picture, as `seam` finds them.
        right: pictures that the classifier assigns to their own class; counts where it knows all classes.
        seconds: that filling took.
        shown: the first filled pictures.
    """

    mask: str
    fill: str
    psnrs: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    seams: list[float] = field(default_factory=list)
    frechet: float | None = None
    right: int = 0
    seconds: float = 0.0
    shown: list[Pixels] = field(default_factory=list)

    def describe(self, labelled: bool) -> dict[str, Any]:
        """The row as JSON has it: means with their standard errors."""
        count = len(self.psnrs)
        found: dict[str, Any] = {"mask": self.mask, "fill": self.fill}
        for name, values in (("psnr", self.psnrs), ("distance", self.distances), ("seam", self.seams)):
            if values:
                found[name] = float(np.mean(values))
                found[f"{name}_error"] = float(np.std(values, ddof=1) / math.sqrt(count))
        if self.frechet is not None:
            found["frechet"] = self.frechet
        if labelled:
            found |= {"right": self.right, "accuracy": self.right / count}
        return {**found, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Report:
    """All rows, and what holds for all.

    Attributes:
        rows: mask by mask, each with the fills in their order.
        labelled: whether each class of the pictures is one of the extractor's.
        right: originals that the classifier assigns to their own class, if so.
        shares: mean share of the picture that a mask covers, by its name.
        seams: mean seam of the originals, by the name of the mask.
    """

    rows: list[Row]
    labelled: bool
    right: int
    shares: dict[str, float]
    seams: dict[str, float]


class _Judge:
    """An extractor's look at pictures, with the originals' features at hand."""

    def __init__(self, extractor: Extractor, held_out: HeldOut, batch_size: int) -> None:
        self.extractor = extractor
        size = extractor.size or held_out.pixels.shape[1:3]
        self.cut = image_transform(size, "adm", train=False)
        named = class_places(held_out.class_names, extractor.class_names)
        self.labelled = min(named) >= 0
        self.labels = torch.tensor([named[label] for label in held_out.labels])
        self.statistics = FeatureStatistics()
        count = len(held_out.pixels)
        batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
        looks = [self.look(each, held_out.pixels[each.start : each.stop]) for each in batches]
        self.features = torch.cat([features for features, _ in looks])  # [N, F]
        self.right = sum(right for _, right in looks)
        self.statistics.add(self.features)

    def look(self, numbers: Sequence[int], pictures: Pixels) -> tuple[torch.Tensor, int]:
        """Features [B, F], and how many pictures are assigned to their class."""
        if pictures.shape[1:3] != self.cut.size:
            pictures = np.stack([self.cut(Image.fromarray(each)) for each in pictures])
        features, _, logits = self.extractor(as_tensor(list(pictures)))
        right = 0
        if logits is not None and self.labelled:
            right = int((logits.argmax(dim=1).cpu() == self.labels[list(numbers)]).sum())
        return features.double().cpu(), right


@torch.inference_mode()
def measure_fills(
    extractor: Extractor | None,
    held_out: HeldOut,
    fills: Mapping[str, Fill],
    *,
    masks: Sequence[str] = MASKS,
    seed: int = 0,
    batch_size: int = 32,
    shown: int = 0,
) -> Report:
    """Fill every mask of every picture in every way, and judge the results; a bar shows how far it is.

    Args:
        extractor: gives the features; pictures are scaled and centre-cropped to its size as ADM does. None measures
            without features.
        held_out: the pictures.
        fills: by their names.
        masks: of `MASKS`.
        seed: of the free-form masks.
        batch_size: pictures that are filled at once; free-form masks go one by one.
        shown: of the first filled pictures that are kept.
    """
    judge = _Judge(extractor, held_out, batch_size) if extractor else None
    count = len(held_out.pixels)
    rows, shares, seams = [], {}, {}
    with progress("filling", len(masks) * len(fills) * count) as bar:
        for mask in masks:
            together = 1 if mask == "free-form" else batch_size
            batches = [range(i, min(i + together, count)) for i in range(0, count, together)]
            regions = [region_of(mask, held_out.pixels.shape[1:3], seed, batch[0]) for batch in batches]
            shares[mask] = float(np.mean([region.mean() / 255 for region in regions]))
            whole = [region for batch, region in zip(batches, regions, strict=True) for _ in batch]
            seams[mask] = float(np.mean([seam(*pair) for pair in zip(held_out.pixels, whole, strict=True)]))
            for name, fill in fills.items():
                bar.note(f"{mask}, {name}")
                rows.append(_measure(mask, name, fill, held_out, batches, regions, judge, bar.advance, shown))
    return Report(rows, bool(judge and judge.labelled), judge.right if judge else 0, shares, seams)


def _measure(
    mask: str,
    name: str,
    fill: Fill,
    held_out: HeldOut,
    batches: Sequence[range],
    regions: Sequence[Pixels],
    judge: _Judge | None,
    advance: Callable[[int], None],
    shown: int,
) -> Row:
    """Fill one mask of all pictures in one way."""
    row, statistics = Row(mask, name), FeatureStatistics()
    for batch, region in zip(batches, regions, strict=True):
        originals = held_out.pixels[batch.start : batch.stop]  # [B, H, W, 3]
        start = time.perf_counter()
        drawn = fill(batch, originals, region)
        row.seconds += time.perf_counter() - start
        filled = np.where(region[None, :, :, None] > 0, drawn, originals)
        row.psnrs += [psnr(a, b, region) for a, b in zip(filled, originals, strict=True)]
        row.seams += [seam(each, region) for each in filled]
        row.shown += list(filled[: max(0, shown - batch.start)])
        if judge:
            features, right = judge.look(batch, filled)
            statistics.add(features)
            row.distances += (features - judge.features[batch.start : batch.stop]).norm(dim=1).tolist()
            row.right += right
        advance(len(batch))
    if judge:
        row.frechet = statistics.distance(judge.statistics)
    return row

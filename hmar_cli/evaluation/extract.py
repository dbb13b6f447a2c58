"""What a classifier finds in a source of images: statistics of its features, and how often it agrees."""

import sys
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from hmar_cli.console import progress
from hmar_cli.data.ahead import ordered_map
from hmar_cli.data.images import Example, ImageSource
from hmar_cli.data.transforms import Pixels, image_transform, to_tensor
from hmar_cli.errors import UserError
from hmar_cli.evaluation.frechet import FeatureStatistics
from hmar_cli.models.classifier import ImageClassifier
from hmar_cli.models.scales import Side


@dataclass
class Findings:
    """What was found in a source.

    Attributes:
        source: its spelling.
        statistics: of the features of every image that could be read.
        labelled: whether each of its classes is one of the classifier's.
        right: images that the classifier assigns to their own class, if so.
        unreadable: images that could not be read, which count nowhere else.
        error: why the first of them could not.
    """

    source: str
    labelled: bool
    statistics: FeatureStatistics = field(default_factory=FeatureStatistics)
    right: int = 0
    unreadable: int = 0
    error: str = ""

    def describe(self) -> dict[str, Any]:
        """The findings as JSON has them."""
        count = self.statistics.count
        accuracy = {"right": self.right, "accuracy": self.right / count} if self.labelled else {}
        return {"source": self.source, "count": count, "unreadable": self.unreadable, **accuracy}


@torch.inference_mode()
def extract(
    network: ImageClassifier,
    class_names: tuple[str, ...],
    source: ImageSource,
    *,
    size: Side,
    count: int = 0,
    batch_size: int = 256,
    workers: int = 2,
) -> Findings:
    """Look at the images of a source, a batch at a time, in their order; a bar shows how far it is.

    Args:
        network: the classifier, in evaluation mode, on its device.
        class_names: its classes.
        source: the images; a stream is fine.
        size: to which images are scaled and centre-cropped, as ADM does.
        count: of the first images; 0 is all.
        batch_size: images at once.
        workers: threads that decode.

    Raises:
        UserError: fewer than two images that can be read, as a covariance needs.
    """
    cut, rng = image_transform(size, "adm", train=False), np.random.default_rng(0)  # which cuts the middle
    device = next(network.parameters()).device
    places = {name: place for place, name in enumerate(class_names)}
    labels = [places.get(name, -1) for name in source.class_names]
    found = Findings(source.name, labelled=min(labels) >= 0)
    total = min(count or sys.maxsize, source.length or sys.maxsize)

    def decoded(deferred: Any) -> tuple[Example, Pixels | None]:
        example: Example = deferred()
        return example, None if example.image is None else cut(example.image, rng)

    examples = ordered_map(decoded, source.deferred(0, total), workers)
    with progress("looking at images", total if total < sys.maxsize else None) as bar:
        while batch := list(islice(examples, batch_size)):
            bar.advance(len(batch))
            bad = [example for example, pixels in batch if pixels is None]
            found.unreadable += len(bad)
            found.error = found.error or (f"image {bad[0].index}: {bad[0].error}" if bad else "")
            good = [(labels[example.label], pixels) for example, pixels in batch if pixels is not None]
            if not good:
                continue
            features = network.features(to_tensor(np.stack([pixels for _, pixels in good])).to(device))
            found.statistics.add(features)
            named = network.head(features).argmax(dim=1).tolist()
            found.right += sum(name == label for name, (label, _) in zip(named, good, strict=True))
    if found.statistics.count < 2:
        raise UserError(
            f"{source.name} has {found.statistics.count} images that can be read; a distance needs 2 or more",
            found.error or "give more images",
        )
    return found

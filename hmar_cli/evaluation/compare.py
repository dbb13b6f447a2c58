"""How far generated images are from real ones, by the features of a classifier."""

from dataclasses import dataclass
from typing import Any

from hmar_cli.data.images import ImageSource
from hmar_cli.evaluation.extract import Findings, extract
from hmar_cli.evaluation.frechet import frechet_distance
from hmar_cli.models.classifier import ImageClassifier
from hmar_cli.models.scales import Side


@dataclass(frozen=True)
class Comparison:
    """What was found in samples and in their reference, and the Fréchet distance of the two."""

    distance: float
    samples: Findings
    reference: Findings

    def describe(self) -> dict[str, Any]:
        """The comparison as JSON has it."""
        return {
            "distance": self.distance,
            "samples": self.samples.describe(),
            "reference": self.reference.describe(),
        }


def compare_images(
    network: ImageClassifier,
    class_names: tuple[str, ...],
    samples: ImageSource,
    reference: ImageSource,
    *,
    size: Side,
    count: int = 0,
    batch_size: int = 256,
    workers: int = 2,
) -> Comparison:
    """Look at samples and at their whole reference with one classifier.

    Args:
        network: the classifier, in evaluation mode, on its device.
        class_names: its classes.
        samples: generated images.
        reference: real images.
        size: to which images are scaled and centre-cropped, as ADM does.
        count: of the first samples; 0 is all.
        batch_size: images at once.
        workers: threads that decode.

    Raises:
        UserError: fewer than two images of either that can be read.
    """
    ours, real = (
        extract(network, class_names, source, size=size, count=first, batch_size=batch_size, workers=workers)
        for source, first in ((samples, count), (reference, 0))
    )
    pairs = [(each.statistics.mean, each.statistics.covariance) for each in (ours, real)]
    return Comparison(frechet_distance(*pairs[0], *pairs[1]), ours, real)

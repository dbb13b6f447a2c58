"""From what an extractor saw to numbers: FID, sFID, the Inception Score, KID, precision and recall.

KID, the Inception Score, precision and recall are torch-fidelity's own functions. It takes no statistics from files,
and asserts where float32 and float64 meet, so that the Fréchet distances are those of `frechet`, all in float64.

Letters: N generated images, M of the reference, F features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hmar_cli.errors import UserError
from hmar_cli.evaluation.extractors import Extractor
from hmar_cli.evaluation.frechet import FeatureStatistics
from hmar_cli.evaluation.observing import METRICS, Observations

NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "IS",
    "kid": "KID",
    "precision": "Precision",
    "recall": "Recall",
}
"""How metrics are printed."""

HIGHER_IS_BETTER = frozenset({"is", "precision", "recall"})

WITHOUT_REFERENCE = frozenset({"is"})
"""Metrics of generated images alone."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What numbers depend on besides images and extractor; the defaults are those of papers and of torch-fidelity.

    Attributes:
        seed: of the order in which images are split for the Inception Score, and of KID's subsets.
        is_splits: parts over which the Inception Score is averaged.
        kid_subsets: draws of KID.
        kid_subset_size: images of a draw; fewer where a set has fewer, as the result says.
        neighbours: k of precision and recall: a ball reaches to an image's k-th nearest neighbour.
    """

    seed: int = 2020
    is_splits: int = 10
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    neighbours: int = 3


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names of metrics by commas.

    Raises:
        UserError: none, or one that there is not.
    """
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if unknown := [name for name in names if name not in METRICS]:
        raise UserError(f"--metrics {text}: no metric {unknown[0]!r}", f"there are {', '.join(METRICS)}")
    if not names:
        raise UserError("--metrics names none", f"there are {', '.join(METRICS)}")
    return names


def needs_reference(metrics: Sequence[str]) -> bool:
    """Whether any of the metrics compares with real images."""
    return not set(metrics) <= WITHOUT_REFERENCE


def metric_name(metric: str, extractor: Extractor | Observations | str, count: int) -> str:
    """What a number is called: "FID-50k", "FID-2k", "FID-12345", "FID[classifier-cifar10]-10k".

    Only with the published Inception does a metric bear its plain name, and never without the number of images.

    Args:
        metric: of `METRICS`.
        extractor: what looked at the images; a text is the name of one that is not the published Inception.
        count: of the generated images.

    Raises:
        ValueError: an unknown metric.
    """
    if metric not in NAMES:
        raise ValueError(f"expected a metric of {METRICS}, got {metric!r}")
    if isinstance(extractor, str):
        name, standard = extractor, False
    else:
        name = extractor.name if isinstance(extractor, Extractor) else extractor.extractor_name
        standard = extractor.standard
    of = "" if standard else f"[{name}]"
    images = f"{count // 1000}k" if count and count % 1000 == 0 else str(count)
    return f"{NAMES[metric]}{of}-{images}"


def measure(
    subject: Observations,
    reference: Observations | None,
    metrics: Sequence[str],
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Measure generated images.

    Args:
        subject: what the extractor saw in the generated images.
        reference: what it saw in real ones; None where no metric compares.
        metrics: of `METRICS`.
        protocol: what else the numbers depend on.

    Returns:
        By metric, in their order: a number; for "is" {"mean", "std"} over parts, for "kid" {"mean", "std",
        "subset_size"} over subsets.

    Raises:
        ValueError: an unknown metric, or observations that were made without what it needs.
        UserError: another extractor or size of images, no reference, or too few images.
    """
    chosen = protocol or Protocol()
    if unknown := [each for each in metrics if each not in METRICS]:
        raise ValueError(f"expected metrics of {METRICS}, got {unknown[0]!r}")
    if needs_reference(metrics):
        if reference is None:
            first = next(each for each in metrics if each not in WITHOUT_REFERENCE)
            raise UserError(f"{first} compares with real images", "give them: --reference")
        require_comparable(subject, reference)
    found: dict[str, Any] = {}
    for metric in metrics:
        if metric == "is":
            found[metric] = inception_score(_kept(subject, subject.logits, metric), chosen)
            continue
        assert reference is not None
        if metric in ("precision", "recall"):
            if metric not in found:
                pair = _features(subject, reference, metric)
                found |= {k: v for k, v in precision_recall(*pair, chosen).items() if k in metrics}
        elif metric == "kid":
            found[metric] = kernel_distance(*_features(subject, reference, metric), chosen)
        else:
            found[metric] = _distance(metric, subject, reference)
    return {metric: found[metric] for metric in metrics}


def require_comparable(subject: Observations, reference: Observations) -> None:
    """See that two sets were looked at in the same way.

    Raises:
        UserError: another extractor, or images of another size or crop.
    """
    if subject.fingerprint != reference.fingerprint:
        ours, theirs = (f"{each.extractor_name} ({each.fingerprint[:12]})" for each in (subject, reference))
        raise UserError(
            f"{reference.source} was looked at by {theirs}, the images by {ours}",
            "use one extractor for both",
        )
    require_same_cut(subject.size, subject.crop, reference)


def require_same_cut(size: tuple[int, int] | None, crop: str, reference: Observations) -> None:
    """See that images and reference are scaled and cropped alike, as far as is known of both.

    Args:
        size: (H, W) of the images; None where it is unknown.
        crop: "adm", "var", or "none" for images as they are.
        reference: what the extractor saw in the real images.

    Raises:
        UserError: they are not.
    """
    if None not in (size, reference.size) and size != reference.size:
        sizes = [f"{each[1]} x {each[0]}" for each in (size, reference.size) if each]
        raise UserError(
            f"the images are {sizes[0]}, those of {reference.source} {sizes[1]}",
            "give --size, so that both are scaled and cropped alike",
        )
    if "none" not in (crop, reference.crop) and crop != reference.crop:
        raise UserError(
            f"the images are cut as by --crop {crop}, those of {reference.source} as by --crop {reference.crop}",
            f"give --crop {reference.crop}, so that both are cut alike",
        )


def _kept(found: Observations, part: Tensor | None, metric: str) -> Tensor:
    if part is None:
        raise ValueError(f"expected observations made for {metric!r}; {found.source} was looked at without")
    return part


def _features(subject: Observations, reference: Observations, metric: str) -> tuple[Tensor, Tensor]:
    if reference.features is None and subject.features is not None:
        raise UserError(
            f"{reference.source} holds no features of single images, which {metric} needs",
            f"leave {metric} out, or make the statistics again with it",
        )
    return _kept(subject, subject.features, metric), _kept(reference, reference.features, metric)


def _distance(metric: str, subject: Observations, reference: Observations) -> float:
    """Fréchet distance of pooled or spatial features."""
    pair: list[FeatureStatistics] = []
    for each in (subject, reference):
        statistics = each.statistics if metric == "fid" else each.spatial
        if statistics is None:
            raise ValueError(
                f"expected observations made for {metric!r}; {each.source} was looked at without"
            )
        if statistics.count < 2:
            raise UserError(
                f"{each.source} has {statistics.count} images that can be read; {metric} needs 2 or more",
                each.error or "give more images",
            )
        pair.append(statistics)
    ours, real = pair
    return ours.distance(real)


def inception_score(logits: Tensor, protocol: Protocol) -> dict[str, float]:
    """Inception Score (Salimans et al. 2016) by torch-fidelity, over parts of images in an order of chance.

    Without that, images that come class by class would fill parts of few classes each, and score far too low.

    Args:
        logits: [N, C].
        protocol: the seed of the order, and the number of parts.

    Raises:
        UserError: fewer images than parts.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    if len(logits) < protocol.is_splits:
        raise UserError(
            f"is needs an image in each of {protocol.is_splits} parts, got {len(logits)} images",
            "leave is out",
        )
    found = isc_features_to_metric(logits, protocol.is_splits, True, protocol.seed)
    return {"mean": found["inception_score_mean"], "std": found["inception_score_std"]}


def kernel_distance(generated: Tensor, real: Tensor, protocol: Protocol) -> dict[str, float]:
    """KID (Bińkowski et al. 2018) by torch-fidelity: mean and spread over subsets.

    Args:
        generated: [N, F].
        real: [M, F].
        protocol: number and size of the subsets, and the seed that draws them.

    Raises:
        UserError: fewer than two images.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(protocol.kid_subset_size, len(generated), len(real))
    if size < 2:
        raise UserError("kid needs 2 images or more of both sets", "leave kid out")
    found = kid_features_to_metric(
        generated,
        real,
        kid_subsets=protocol.kid_subsets,
        kid_subset_size=size,
        rng_seed=protocol.seed,
        verbose=False,
    )
    mean, std = (found[f"kernel_inception_distance_{part}"] for part in ("mean", "std"))
    return {"mean": mean, "std": std, "subset_size": size}


def precision_recall(generated: Tensor, real: Tensor, protocol: Protocol) -> dict[str, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) by torch-fidelity.

    Precision is the share of generated images within the balls of real ones, recall the share of real images within
    the balls of generated ones. torch-fidelity takes the generated set first; betas before 0.4.0 took it second.

    Args:
        generated: [N, F].
        real: [M, F].
        protocol: the neighbour that a ball reaches to.

    Raises:
        UserError: not more images than neighbours.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(generated), len(real)) <= protocol.neighbours:
        raise UserError(
            f"precision and recall need more than {protocol.neighbours} images of both sets",
            "give more images",
        )
    found = prc_features_to_metric(
        generated,
        real,
        prc_neighborhood=protocol.neighbours,
        prc_batch_size=2000,  # distances of 2000 images at once: 50 000 x 50 000 would take 10 GB
        save_cpu_ram=True,
        verbose=False,
    )
    counts = (("precision", len(generated)), ("recall", len(real)))
    return {name: round(found[name] * count) / count for name, count in counts}  # it divides in float32

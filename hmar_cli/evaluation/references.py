"""Statistics of reference sets in files: ADM's, and our own.

    mu, sigma        mean [F] and covariance [F, F] of pooled features
    mu_s, sigma_s    those of spatial features, for sFID
    arr_0            ADM's alone: images (10 000 of ImageNet's), for precision and recall, and for nothing else
    features         our own alone: [M, F] float32, for KID, precision and recall
    about            our own alone: JSON, of which images, how they were cut, and which extractor looked

Nothing in them is ever unpickled.

Letters: M images, F features.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmar_cli.data.arrays import open_arrays
from hmar_cli.data.sharing import once
from hmar_cli.data.sources import open_source
from hmar_cli.data.transforms import Crop
from hmar_cli.errors import UserError
from hmar_cli.evaluation.extractors import Extractor
from hmar_cli.evaluation.frechet import FeatureStatistics
from hmar_cli.evaluation.inception import PUBLISHED
from hmar_cli.evaluation.observing import NEEDS_FEATURES, Observations, observe, observe_together
from hmar_cli.files import atomic_file, file_sha256
from hmar_cli.models.scales import Side

FORMAT, VERSION = "hmar statistics", 1

ARRAYS = frozenset({"mu", "sigma", "mu_s", "sigma_s", "features", "about"})
"""What is read at once."""

UNSAID = 2
"""Images that stand for a number which a file does not say; no distance depends on it."""


def is_statistics(path: Path) -> bool:
    """Whether a file holds statistics, ADM's or ours, rather than images alone."""
    path = path.expanduser()
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"mu.npy", "sigma.npy"} <= set(archive.namelist())


def save_statistics(found: Observations, target: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write what an extractor saw in a set of real images, to compare with again and again.

    Args:
        found: the observations; spatial statistics and features are written where there are any.
        target: the `.npz` file.
        about: what else to record.

    Raises:
        UserError: fewer than two images.
    """
    if found.count < 2:
        raise UserError(
            f"{found.source} has {found.count} images that can be read; statistics need 2 or more",
            found.error or "give more images",
        )
    record = {
        "format": FORMAT,
        "version": VERSION,
        **found.describe(),
        "extractor": found.extractor,
        **(about or {}),
    }
    parts = {"mu": found.statistics.mean, "sigma": found.statistics.covariance}
    if found.spatial is not None:
        parts |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance}
    if found.features is not None:
        parts["features"] = found.features
    arrays: dict[str, Any] = {name: part.cpu().numpy() for name, part in parts.items()}
    arrays["about"] = np.array(json.dumps(record, ensure_ascii=False))
    with atomic_file(target) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_reference(
    path: Path, extractor: Extractor, metrics: Sequence[str], batch_size: int = 64
) -> Observations:
    """Read statistics of real images.

    ADM's files come without features: where a metric needs them, the extractor looks at the images that they hold, in
    this process alone.

    Args:
        path: the `.npz` file.
        extractor: that looks at the images which are compared.
        metrics: that will be measured.
        batch_size: images at once, where there are any to look at.

    Raises:
        UserError: no such file, another format, statistics by another extractor, or without what a metric needs.
    """
    path = path.expanduser()
    needed = [each for each in metrics if each in NEEDS_FEATURES]
    arrays, record = _read(path, ARRAYS if needed else ARRAYS - {"features"})
    try:
        found = _observations(path, arrays, record, extractor)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no statistics that can be used: {error}", _hint()) from error
    if found.fingerprint != extractor.fingerprint:
        raise UserError(
            f"{path} has statistics of {found.extractor_name} ({found.fingerprint[:12]}), and the extractor is "
            f"{extractor.name} ({extractor.fingerprint[:12]})",
            "use the extractor that they were made with, or make them again with this one",
        )
    if "sfid" in metrics and found.spatial is None:
        raise UserError(
            f"{path} has no mu_s and sigma_s, which sfid needs", "leave sfid out, or make it again"
        )
    if needed and found.features is None:
        if "arr_0" not in arrays:
            raise UserError(
                f"{path} holds no features of single images, which {needed[0]} needs",
                f"leave {needed[0]} out, or make it again with that metric",
            )
        looked = observe(
            open_arrays(path),
            extractor,
            metrics=needed,
            batch_size=batch_size,
            title="looking at the reference",
        )
        found.features = looked.features
    return found


def open_reference(
    spelling: str,
    extractor: Extractor,
    metrics: Sequence[str],
    *,
    size: Side | None = None,
    crop: Crop = "adm",
    batch_size: int = 64,
) -> Observations:
    """Look at real images of any source, on all processes, or let the first one read the statistics of a file.

    Args:
        spelling: of the source, or path of an `.npz` of statistics.
        extractor: that looks at the images which are compared.
        metrics: that will be measured.
        size: to which images are cut; None for the extractor's, or else for images as they are.
        crop: how.
        batch_size: images at once.

    Raises:
        UserError: as `read_reference` and `open_source`, or no image that can be read.
    """
    if is_statistics(path := Path(spelling)):
        return once(lambda: read_reference(path, extractor, metrics, batch_size))
    wanted = size if size is not None else extractor.size
    found = observe_together(
        open_source(spelling, size=wanted),
        extractor,
        metrics=metrics,
        size=size,
        crop=crop,
        batch_size=batch_size,
        title="looking at the reference",
    )
    if not found.count:
        raise UserError(f"{spelling} has no images that can be read", found.error or "give more images")
    return found


def _read(path: Path, wanted: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays by their names, None for those that are not wanted, such as ADM's images; and the record."""
    if not path.is_file():
        raise UserError(f"no file {path}", _hint())
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] if name in wanted else None for name in file.files}
        record = json.loads(str(arrays["about"])) if "about" in arrays else {}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as statistics: {error}", _hint()) from error
    if missing := [name for name in ("mu", "sigma") if name not in arrays]:
        raise UserError(f"{path} holds no {missing[0]}", _hint())
    if record and (not isinstance(record, dict) or record.get("format") != FORMAT):
        raise UserError(f"{path} is not a file of statistics of hmar", _hint())
    if record and record.get("version") != VERSION:
        raise UserError(
            f"{path} has version {record.get('version')} of the format, this program reads {VERSION}",
            "update hmar-cli, or make the file again",
        )
    return arrays, record


def _observations(
    path: Path, arrays: Mapping[str, Any], record: Mapping[str, Any], extractor: Extractor
) -> Observations:
    """A file's contents; ADM's is taken for one of the published Inception."""
    count = int(record.get("count") or 0)

    def statistics(mean: str, covariance: str) -> FeatureStatistics | None:
        if mean not in arrays or covariance not in arrays:
            return None
        first, second = (
            torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in (mean, covariance)
        )
        return FeatureStatistics.of_moments(first, second, count or UNSAID)

    pooled = statistics("mu", "sigma")
    assert pooled is not None
    features: Tensor | None = None
    if arrays.get("features") is not None:
        features = torch.from_numpy(np.asarray(arrays["features"], np.float32))
        if features.shape != (count, len(pooled.mean)):
            raise ValueError(f"expected features [{count}, {len(pooled.mean)}], got {list(features.shape)}")
    size = record.get("size") or (open_arrays(path).shape[1:3] if "arr_0" in arrays else None)
    return Observations(
        source=str(path),
        extractor=dict(record.get("extractor") or _adm_extractor(extractor)),
        standard=extractor.standard,
        count=count,
        size=(int(size[0]), int(size[1])) if size else None,
        crop=str(record.get("crop", "none")),  # others do not say how they cut
        digest=str(record.get("sha256") or file_sha256(path)),  # that of the images, where it is known
        statistics=pooled,
        spatial=statistics("mu_s", "sigma_s"),
        features=features,
    )


def _adm_extractor(extractor: Extractor) -> dict[str, Any]:
    """What files without a record were made with: Inception, whose published weights alone fit."""
    if extractor.standard:
        return extractor.describe()
    return {"name": "inception", "fingerprint": PUBLISHED}


def _hint() -> str:
    return "give a file of ADM's, such as VIRTUAL_imagenet256_labeled.npz, or one that --make-stats wrote"

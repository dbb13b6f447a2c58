"""Files of statistics, ours and ADM's: what is written comes back, and what does not fit is refused."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_extractors import FEATURES, Shown, pictures, toy_extractor

from hmar_cli.errors import UserError
from hmar_cli.evaluation.measures import measure, require_same_cut
from hmar_cli.evaluation.observing import METRICS, Observations, observe
from hmar_cli.evaluation.references import is_statistics, open_reference, read_reference, save_statistics

STANDARD = toy_extractor("inception", standard=True)


def look(
    count: int, seed: int = 0, metrics: tuple[str, ...] = METRICS, extractor: Any = None
) -> Observations:
    images = list(pictures(count, seed=seed))
    return observe(Shown(images), extractor or toy_extractor(), metrics=metrics)


def adm_file(path: Path, found: Observations, images: int = 12, **changes: Any) -> Path:
    """A file as ADM wrote its own: float32 means, float64 covariances, and images for precision and recall."""
    assert found.spatial is not None
    parts = {
        "mu": found.statistics.mean.float().numpy(),
        "sigma": found.statistics.covariance.numpy(),
        "mu_s": found.spatial.mean.float().numpy(),
        "sigma_s": found.spatial.covariance.numpy(),
        "arr_0": pictures(images, seed=5),
        **changes,
    }
    np.savez(path, **{name: part for name, part in parts.items() if part is not None})
    return path


def refused(path: Path, *words: str, metrics: tuple[str, ...] = ("fid",), extractor: Any = None) -> None:
    with pytest.raises(UserError) as caught:
        read_reference(path, extractor or toy_extractor(), metrics)
    text = f"{caught.value} {caught.value.hint}"
    assert all(word in text for word in words), text
    assert caught.value.hint and "\n" not in text


def test_our_own_files_give_the_numbers_of_the_images(tmp_path: Path) -> None:
    ours, real = look(20), look(30, seed=1)
    path = tmp_path / "real.npz"
    save_statistics(real, path, {"made_for": "a test"})
    assert is_statistics(path) and is_statistics(Path("~") / os.path.relpath(path, Path.home()))
    read = read_reference(path, toy_extractor(), METRICS)
    found, expected = (measure(ours, each, METRICS) for each in (read, real))
    for metric in METRICS:
        assert found[metric] == pytest.approx(expected[metric], rel=1e-12), metric
    assert (read.count, read.size, read.crop, read.source) == (30, (8, 8), "none", str(path))
    assert read_reference(path, toy_extractor(), ("fid",)).features is None  # 400 MB that nothing needs
    assert read.digest == real.digest  # that of the images: a file of them is no other reference
    about = json.loads(str(np.load(path)["about"]))
    assert about["sha256"] == real.digest and about["extractor"]["fingerprint"] == "toy"
    assert (about["source"], about["count"], about["made_for"]) == ("shown", 30, "a test")


def test_only_what_was_kept_is_written(tmp_path: Path) -> None:
    path = tmp_path / "real.npz"
    save_statistics(look(30, metrics=("fid",)), path)
    assert set(np.load(path).files) == {"mu", "sigma", "about"}
    assert read_reference(path, toy_extractor(), ("fid", "is")).features is None
    refused(path, "no features of single images, which kid needs", metrics=("fid", "kid"))
    refused(path, "no mu_s and sigma_s, which sfid needs", metrics=("sfid",))
    with pytest.raises(UserError, match="has 1 images"):
        save_statistics(look(1), tmp_path / "one.npz")
    assert [each.name for each in tmp_path.iterdir()] == ["real.npz"]


def test_adms_statistics_are_of_all_images_and_its_own_images_for_precision_alone(tmp_path: Path) -> None:
    """Of the 12 images in the file FID would be another: they are no part of mu and sigma."""
    ours = look(20, extractor=STANDARD)
    every = look(40, seed=1, extractor=STANDARD)
    path = adm_file(tmp_path / "VIRTUAL.npz", every)
    read = read_reference(path, STANDARD, METRICS)
    few = observe(Shown(list(pictures(12, seed=5))), STANDARD, metrics=METRICS)
    found = measure(ours, read, METRICS)
    for metric in ("fid", "sfid"):
        assert found[metric] == pytest.approx(measure(ours, every, (metric,))[metric], rel=1e-5)
        assert found[metric] != pytest.approx(measure(ours, few, (metric,))[metric], rel=0.01)
    for metric in ("precision", "recall"):
        assert found[metric] == measure(ours, few, (metric,))[metric]
    assert (read.count, read.size, read.describe()["count"]) == (0, (8, 8), None)
    assert read.features is not None and read.features.shape == (12, FEATURES)
    assert read.digest == hashlib.sha256(path.read_bytes()).hexdigest()  # nobody knows of which images


def test_adms_images_are_left_alone_where_nothing_needs_them(tmp_path: Path) -> None:
    path = adm_file(tmp_path / "VIRTUAL.npz", look(9, extractor=STANDARD))

    def never(pixels: Any) -> Any:
        raise AssertionError("looked")

    blind = toy_extractor("inception", standard=True)
    object.__setattr__(blind, "look", never)
    assert read_reference(path, blind, ("fid", "sfid", "is")).features is None
    with pytest.raises(AssertionError, match="looked"):
        read_reference(path, blind, ("precision",))


def test_float32_means_meet_float64_sums(tmp_path: Path) -> None:
    """A trap: torch-fidelity asserts that both means are of one type."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    ours, every = look(20, extractor=STANDARD), look(40, seed=1, extractor=STANDARD)
    read = read_reference(adm_file(tmp_path / "VIRTUAL.npz", every), STANDARD, ("fid",))
    assert read.statistics.mean.dtype == read.statistics.covariance.dtype == torch.float64
    pairs = [
        {"mu": each.mean.numpy(), "sigma": each.covariance.numpy()}
        for each in (ours.statistics, every.statistics)
    ]
    single = {**pairs[1], "mu": pairs[1]["mu"].astype(np.float32)}
    with pytest.raises(AssertionError):
        fid_statistics_to_metric(pairs[0], single, False)
    expected = fid_statistics_to_metric(*pairs, False)["frechet_inception_distance"]
    assert measure(ours, read, ("fid",))["fid"] == pytest.approx(expected, rel=1e-5)


def test_statistics_of_another_extractor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "real.npz"
    save_statistics(look(9), path)
    refused(path, "statistics of toy (toy)", "the extractor is other", extractor=toy_extractor("other"))
    adm = adm_file(tmp_path / "VIRTUAL.npz", look(9))
    refused(adm, "statistics of inception (6726825d)", "the extractor is toy", extractor=toy_extractor())


def test_statistics_that_others_made_go_with_any_crop(tmp_path: Path) -> None:
    """They do not say how their images were cut; ours do."""
    real = observe(Shown(list(pictures(9))), STANDARD, metrics=METRICS, size=8, crop="adm")
    save_statistics(real, tmp_path / "ours.npz")
    ours, theirs = (
        open_reference(str(path), STANDARD, ("fid",))
        for path in (tmp_path / "ours.npz", adm_file(tmp_path / "VIRTUAL.npz", real))
    )
    assert (ours.crop, theirs.crop) == ("adm", "none")
    for crop in ("adm", "var"):
        require_same_cut((8, 8), crop, theirs)
    with pytest.raises(UserError, match=r"as by --crop var, those of .*ours\.npz as by --crop adm"):
        require_same_cut((8, 8), "var", ours)


def test_images_of_another_size_than_adms_are_refused(tmp_path: Path) -> None:
    path = adm_file(tmp_path / "VIRTUAL.npz", look(9, extractor=STANDARD))
    read = read_reference(path, STANDARD, ("fid",))
    wide = observe(Shown(list(pictures(9, (8, 12)))), STANDARD)
    with pytest.raises(UserError, match=r"the images are 12 x 8, those of .*VIRTUAL\.npz 8 x 8"):
        measure(wide, read, ("fid",))


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    found = look(9)
    refused(tmp_path / "none.npz", "no file", "--make-stats")
    path = tmp_path / "bad.npz"
    path.write_bytes(b"no archive")
    refused(path, "cannot read")
    assert not is_statistics(path) and not is_statistics(tmp_path)
    np.savez(path, arr_0=pictures(3))
    assert not is_statistics(path)
    refused(path, "holds no mu")
    np.savez(path, mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    refused(path, "cannot read")
    for name, value in (
        ("sigma", np.zeros((3, 4))),
        ("mu", np.full(FEATURES, np.nan)),
        ("sigma", np.triu(np.ones((FEATURES, FEATURES)))),
    ):
        refused(adm_file(path, found, **{name: value}), "no statistics that can be used")
    save_statistics(found, path)
    arrays = dict(np.load(path))
    for record, words in (
        ({"format": "x"}, "not a file of statistics"),
        ({"format": "hmar statistics", "version": 9}, "version 9"),
    ):
        np.savez(path, **{**arrays, "about": np.array(json.dumps(record))})
        refused(path, words)
    np.savez(path, **{**arrays, "features": np.zeros((3, FEATURES), np.float32)})
    refused(path, "expected features [9, 6], got [3, 6]", metrics=("kid",))
    np.savez(path, **{**arrays, "about": np.array("{")})
    refused(path, "cannot read")

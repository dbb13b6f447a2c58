"""Numbers: known answers, SciPy's, torch-fidelity's command line; and the traps that make them wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from toy_extractors import Shown, pictures, save_pngs, toy_extractor

from hmar_cli.data.sources import open_source
from hmar_cli.errors import UserError
from hmar_cli.evaluation.measures import (
    NAMES,
    Protocol,
    inception_score,
    kernel_distance,
    measure,
    metric_name,
    needs_reference,
    parse_metrics,
    precision_recall,
)
from hmar_cli.evaluation.observing import METRICS, Observations, observe

FIDELITY = """
import sys
import torch_fidelity
from toy_extractors import Toy
from torch_fidelity.feature_extractor_base import FeatureExtractorBase


class ToyFidelity(FeatureExtractorBase):
    def __init__(self, name, features_list, **ignored):
        super().__init__(name, features_list)
        self.toy = Toy()

    def forward(self, pixels):
        found = dict(zip(("features", "logits"), self.toy(pixels)))
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"


torch_fidelity.register_feature_extractor("toy", ToyFidelity)
from torch_fidelity.fidelity import main

main()
"""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def look(images: Any, metrics: tuple[str, ...] = METRICS) -> Observations:
    return observe(Shown(list(images)), toy_extractor(), metrics=metrics)


def test_torch_fidelitys_command_line_agrees(tmp_path: Path) -> None:
    """On the same folders, through its own reading of files; FID but for its float32 means."""
    sets = pictures(60, seed=1) // 3 + 90, pictures(50, seed=2)
    folders = [
        save_pngs(tmp_path / name, images) for name, images in zip(("ours", "real"), sets, strict=True)
    ]
    command = [sys.executable, "-c", FIDELITY, "--isc", "--fid", "--kid", "--prc", "--json", "--cpu"]
    command += ["--feature-extractor", "toy", "--input1", str(folders[0]), "--input2", str(folders[1])]
    command += ["--kid-subsets", "7", "--kid-subset-size", "40", "--rng-seed", "11", "--no-cache", "--silent"]
    paths = [str(Path(__file__).parent), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    ours = [
        observe(open_source(str(folder)), toy_extractor(), metrics=METRICS, batch_size=64)
        for folder in folders
    ]
    found = measure(*ours, METRICS, Protocol(seed=11, kid_subsets=7, kid_subset_size=40))
    assert found["is"] == {"mean": theirs["inception_score_mean"], "std": theirs["inception_score_std"]}
    assert found["kid"] == {
        "mean": theirs["kernel_inception_distance_mean"],
        "std": theirs["kernel_inception_distance_std"],
        "subset_size": 40,
    }
    for metric in ("precision", "recall"):  # shares of images, which it divides in float32
        assert np.float32(found[metric]) == np.float32(theirs[metric]), metric
    assert theirs["precision"] - theirs["recall"] > 0.3  # so that an exchange would be seen
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert found["is"]["mean"] > 1 and found["fid"] > 0.01


def test_scipy_computes_the_same_distances() -> None:
    ours, real = look(pictures(40)), look(pictures(30, seed=1))
    found = measure(ours, real, ("fid", "sfid"))
    for metric, parts in (("fid", "features"), ("sfid", "rows")):
        rows = []
        for each, (count, seed) in ((ours, (40, 0)), (real, (30, 1))):
            assert each.features is not None
            spatial = pictures(count, seed=seed)[:, 0].transpose(0, 2, 1).reshape(count, -1)  # B W 3 -> B 3 W
            rows.append(each.features.double().numpy() if parts == "features" else spatial.astype(np.float64))
        means, covariances = (
            [each.mean(axis=0) for each in rows],
            [np.cov(each, rowvar=False) for each in rows],
        )
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        expected = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
        assert found[metric] == pytest.approx(expected, rel=1e-6), metric


def test_the_closed_form_of_gaussians_that_are_moved_and_stretched() -> None:
    """From images to a number: of one axis, FID is (difference of means)^2 + (difference of deviations)^2."""
    from hmar_cli.evaluation.extractors import Extractor, Features

    extractor = Extractor(
        name="colour",
        fingerprint="colour",
        look=lambda pixels: Features(pixels[:, :1, 0, 0].double()),
        device=torch.device("cpu"),
    )
    values = np.arange(60, 100)
    sets = [values, 2 * values + 7]
    images = [np.broadcast_to(each[:, None, None, None], (40, 4, 4, 3)).astype(np.uint8) for each in sets]
    ours, real = (observe(Shown(list(each)), extractor) for each in images)
    deviation = values.std(ddof=1)
    expected = (values.mean() + 7) ** 2 + deviation**2
    assert measure(ours, real, ("fid",))["fid"] == pytest.approx(expected, rel=1e-12)
    assert measure(real, ours, ("fid",))["fid"] == pytest.approx(expected, rel=1e-12)


def test_one_image_repeated_is_precise_and_recalls_nothing() -> None:
    """A trap: versions of torch-fidelity disagree about which set is the generated one."""
    real = pictures(60, seed=1)
    degenerate = np.repeat(real[:1], 60, axis=0)
    found = measure(look(degenerate), look(real), ("precision", "recall"))
    assert found["precision"] == 1.0 and found["recall"] <= 4 / 60
    turned = measure(look(real), look(degenerate), ("recall", "precision"))
    assert turned["recall"] == 1.0 and turned["precision"] <= 4 / 60
    assert list(turned) == ["recall", "precision"]


def test_precision_and_recall_are_what_their_paper_defines() -> None:
    """By comparing every image with every ball (Kynkäänniemi et al. 2019), in float64."""
    ours, real, k = 1.3 * random(50, 3), random(40, 3, seed=1) + 0.3, 2

    def inside(points: Tensor, centres: Tensor) -> float:
        radii = torch.stack([(each - centres).norm(dim=1).sort().values[k] for each in centres])
        return float(
            np.mean([bool(((each - centres).norm(dim=1) <= radii).any()) for each in points.double()])
        )

    found = precision_recall(ours, real, Protocol(neighbours=k))
    assert found == pytest.approx(
        {"precision": inside(ours, real.double()), "recall": inside(real, ours.double())}, rel=1e-15
    )
    assert 0 < found["precision"] < found["recall"] <= 1


def test_the_inception_score_is_the_same_in_any_order() -> None:
    """A trap: class by class, parts of one class each would score 1 where the whole scores 10."""
    classes = torch.arange(10).repeat_interleave(100)
    ordered = 8.0 * torch.nn.functional.one_hot(classes).float() + random(1000, 10) / 10
    shuffled = ordered[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
    from torch_fidelity.metric_isc import isc_features_to_metric

    wrong = isc_features_to_metric(ordered, 10, False, 0)["inception_score_mean"]
    found = [inception_score(each, Protocol())["mean"] for each in (ordered, shuffled)]
    assert wrong < 1.5 and min(found) > 9  # the whole: 9.6 or so
    assert found[0] == pytest.approx(found[1], rel=0.02)
    whole = inception_score(ordered, Protocol(is_splits=1))
    assert whole["std"] == 0 and found[0] < whole["mean"]
    p = ordered.double().softmax(dim=1)
    expected = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp()
    assert whole["mean"] == pytest.approx(expected.item(), rel=1e-12)
    assert inception_score(ordered, Protocol(seed=1)) != inception_score(ordered, Protocol(seed=2))


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate() -> None:
    ours, real = random(30, 5), random(30, 5, seed=1) + 0.2
    found = kernel_distance(ours, real, Protocol(kid_subsets=3))
    assert found["subset_size"] == 30  # fewer than 1000, and said

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / 5 + 1) ** 3

    within = [(kernel(each, each).sum() - kernel(each, each).trace()) / (30 * 29) for each in (ours, real)]
    expected = float(within[0] + within[1] - 2 * kernel(ours, real).mean())
    assert found["mean"] == pytest.approx(expected, rel=1e-4)
    assert found["std"] == pytest.approx(0, abs=1e-6)
    drawn = kernel_distance(ours, real, Protocol(kid_subsets=3, kid_subset_size=10))
    assert drawn["subset_size"] == 10 and drawn["std"] > 1e-3


def test_names_say_the_number_of_images_and_the_extractor() -> None:
    published, toy = toy_extractor("inception", standard=True), toy_extractor("classifier-cifar10")
    assert metric_name("fid", published, 50_000) == "FID-50k"
    assert metric_name("fid", published, 2000) == "FID-2k"
    assert metric_name("is", published, 12_345) == "IS-12345"
    assert metric_name("kid", published, 0) == "KID-0"
    assert metric_name("fid", toy, 10_000) == "FID[classifier-cifar10]-10k"
    assert metric_name("fid", "inception", 50_000) == "FID[inception]-50k"  # a name alone proves nothing
    names = {metric_name(metric, each, 7) for metric in METRICS for each in (published, toy)}
    assert len(names) == 2 * len(METRICS) and "FID" not in names
    assert set(NAMES) == set(METRICS)
    assert metric_name("recall", look(pictures(5)), 5) == "Recall[toy]-5"
    with pytest.raises(ValueError, match="a metric of"):
        metric_name("lpips", toy, 5)


def test_names_of_metrics() -> None:
    assert parse_metrics("fid, IS,fid") == ("fid", "is")
    for text in ("fid,lpips", "", ","):
        with pytest.raises(UserError, match="--metrics") as caught:
            parse_metrics(text)
        assert "precision" in caught.value.hint
    assert not needs_reference(("is",)) and needs_reference(("is", "kid"))


def test_what_cannot_be_compared_is_refused() -> None:
    ours, real = look(pictures(12)), look(pictures(12, seed=1))
    other = observe(Shown(list(pictures(12))), toy_extractor("other"), metrics=METRICS)
    with pytest.raises(UserError, match=r"looked at by other \(other\), the images by toy \(toy\)"):
        measure(ours, other, ("fid",))
    wide = look(pictures(12, (8, 10)))
    with pytest.raises(UserError, match="the images are 8 x 8, those of shown 10 x 8") as caught:
        measure(ours, wide, ("fid",))
    assert "--size" in caught.value.hint
    whole, middle = (
        observe(Shown(list(pictures(12))), toy_extractor(), size=8, crop=crop) for crop in ("adm", "var")
    )
    with pytest.raises(UserError, match="cut as by --crop adm, those of shown as by --crop var") as caught:
        measure(whole, middle, ("fid",))
    assert "--crop var" in caught.value.hint
    assert set(measure(ours, middle, ("fid",))) == {"fid"}  # images as they are
    with pytest.raises(UserError, match="fid compares with real images"):
        measure(ours, None, ("is", "fid"))
    assert set(measure(ours, None, ("is",))) == {"is"}
    with pytest.raises(ValueError, match="metrics of"):
        measure(ours, real, ("lpips",))
    sparse = look(pictures(12), ("fid",))
    for metric in ("kid", "precision", "is", "sfid"):
        with pytest.raises(ValueError, match="looked at without"):
            measure(sparse, sparse, (metric,))
    with pytest.raises(UserError, match="holds no features of single images, which recall needs"):
        measure(ours, sparse, ("recall",))


def test_too_few_images_are_refused() -> None:
    real = look(pictures(12))
    for count, metric, words in (
        (1, "fid", "has 1 images that can be read; fid needs 2 or more"),
        (9, "is", "10 parts, got 9 images"),
        (1, "kid", "kid needs 2 images"),
        (3, "recall", "more than 3 images"),
    ):
        with pytest.raises(UserError, match=words):
            measure(look(pictures(count)), real, (metric,))
    empty = look([None, None])
    with pytest.raises(UserError, match="has 0 images") as caught:
        measure(empty, real, ("fid",))
    assert caught.value.hint == "image 0: broken"


def test_fewer_images_than_features_are_as_far_from_themselves_as_rounding_goes() -> None:
    few = look(pictures(4))
    found = measure(few, few, ("fid", "sfid"))
    for metric, statistics in (("fid", few.statistics), ("sfid", few.spatial)):
        assert statistics is not None and statistics.count < len(statistics.mean)
        rounding = len(statistics.mean) ** 2 * torch.finfo(torch.float64).eps  # of as many values, F eps each
        assert 0 <= found[metric] <= rounding * float(statistics.covariance.trace()), metric

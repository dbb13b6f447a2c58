"""Inception with weights of chance: torch-fidelity's own class, layers and command line give the same."""

import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from toy_extractors import pictures, save_pngs

from hmar_cli.data.sources import open_source
from hmar_cli.errors import UserError
from hmar_cli.evaluation import inception
from hmar_cli.evaluation.extractors import Extractor, open_extractor
from hmar_cli.evaluation.frechet import FeatureStatistics
from hmar_cli.evaluation.measures import Protocol, measure, metric_name
from hmar_cli.evaluation.observing import Observations, observe

PROTOCOL = Protocol(seed=7, is_splits=3, kid_subsets=5, kid_subset_size=6)
METRICS = ("fid", "is", "kid", "precision", "recall")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch-fidelity publishes its own, with weights of chance that keep signals alive."""

    class Untrained(fidelity.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: Any) -> None:
            """Leave the weights as they were drawn."""

    path = tmp_path_factory.mktemp("inception") / "chance.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> Extractor:
    return open_extractor("inception", weights=weights)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    real = pictures(8, (24, 20), seed=2)
    generated = np.concatenate([real[:1] // 2 + shade for shade in range(9)])  # nearly one picture
    return save_pngs(root / "generated", generated), save_pngs(root / "real", real)


@pytest.fixture(scope="module")
def looked(extractor: Extractor, folders: tuple[Path, Path]) -> tuple[Observations, Observations]:
    made = [observe(open_source(str(folder)), extractor, metrics=METRICS, batch_size=3) for folder in folders]
    return made[0], made[1]


def test_features_are_torch_fidelitys(extractor: Extractor, weights: Path) -> None:
    pixels = torch.from_numpy(pictures(2, (24, 20))).permute(0, 3, 1, 2)
    theirs = fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["768", "2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    _, pooled, logits = theirs(pixels)
    found = extractor(pixels)
    assert torch.equal(found.pooled, pooled)
    assert found.logits is not None and torch.equal(found.logits, logits)
    assert pooled.shape == (2, 2048) and logits.shape == (2, 1008) and pooled.std() > 1e-3


def test_spatial_features_are_the_first_channels_of_one_convolution(
    extractor: Extractor, weights: Path
) -> None:
    """ADM reads `mixed_6/conv`, TensorFlow's name for the 1 x 1 convolution of the third block of 768 channels."""
    pixels = torch.from_numpy(pictures(2, (24, 20))).permute(0, 3, 1, 2)
    network = fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    inputs: list[Tensor] = []
    network.Mixed_6d.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    network(pixels)
    block = network.Mixed_6d
    expected = torch.relu(block.branch1x1.bn(block.branch1x1.conv(inputs[0])))  # B 192 17 17
    found = extractor(pixels).spatial
    assert found is not None and found.shape == (2, 17 * 17 * 7)
    for row, column, channel in (
        (0, 0, 0),
        (3, 5, 6),
        (16, 16, 2),
    ):  # TensorFlow's order: row, column, channel
        place = (row * 17 + column) * 7 + channel
        torch.testing.assert_close(found[:, place], expected[:, channel, row, column])


def test_torch_fidelitys_command_line_agrees(
    folders: tuple[Path, Path], looked: tuple[Observations, Observations], weights: Path
) -> None:
    """On the same folders. All is its own arithmetic, and alike to the digit, but for FID.

    With fewer images than features, most eigenvalues of its product of covariances are 0, and come out as rounding
    errors; it adds their roots. That bounds how far it may be off, besides its float32 means.
    """
    flags = f"""--input1 {folders[0]} --input2 {folders[1]} --fid --isc --kid --prc --json --silent --cpu --no-cache
        --feature-extractor inception-v3-compat --feature-extractor-weights-path {weights} --batch-size 3
        --rng-seed 7 --isc-splits 3 --kid-subsets 5 --kid-subset-size 6"""
    command = [sys.executable, "-m", "torch_fidelity.fidelity", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    ours = measure(*looked, METRICS, PROTOCOL)
    assert ours["is"] == {"mean": theirs["inception_score_mean"], "std": theirs["inception_score_std"]}
    assert ours["kid"]["mean"] == theirs["kernel_inception_distance_mean"]
    assert ours["kid"]["std"] == theirs["kernel_inception_distance_std"]
    for metric in ("precision", "recall"):  # shares of images, which it divides in float32
        assert np.float32(ours[metric]) == np.float32(theirs[metric]), metric
    assert theirs["precision"] != theirs["recall"]  # so that an exchange would be seen
    largest = [torch.linalg.matrix_norm(each.statistics.covariance, 2).item() for each in looked]
    roots = 2 * 2048 * math.sqrt(torch.finfo(torch.float64).eps * largest[0] * largest[1])
    means = 1e-5 * sum(float(each.statistics.mean.square().sum()) for each in looked)
    assert roots + means < 0.01 * theirs["frechet_inception_distance"]
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], abs=roots + means, rel=0)


def test_only_the_published_weights_bear_the_plain_name(
    weights: Path, extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (extractor.name, extractor.fingerprint) == ("inception:chance.pth", digest)
    assert not extractor.standard
    assert metric_name("fid", extractor, 50_000) == "FID[inception:chance.pth]-50k"
    monkeypatch.setattr(inception, "PUBLISHED", digest[:8])
    published = open_extractor("inception", weights=weights)
    assert (published.name, published.standard) == ("inception", True)
    assert metric_name("fid", published, 50_000) == "FID-50k"


def test_the_name_that_torch_fidelity_publishes_carries_the_digest() -> None:
    assert fidelity.URL_INCEPTION_V3.endswith(f"-{inception.PUBLISHED}.pth")


def test_weights_are_downloaded_once_and_checked(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, hub = hashlib.sha256(weights.read_bytes()).hexdigest(), tmp_path / "hub"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    monkeypatch.setattr(fidelity, "URL_INCEPTION_V3", weights.as_uri())
    with pytest.raises(UserError, match="cannot be downloaded: invalid hash") as caught:
        inception.published_weights()
    assert not list(hub.rglob("*.*")) and weights.as_uri() in caught.value.hint
    monkeypatch.setattr(inception, "PUBLISHED", digest[:8])
    path = inception.published_weights()
    assert path == hub / "checkpoints" / "chance.pth" and path.read_bytes() == weights.read_bytes()
    monkeypatch.setattr(fidelity, "URL_INCEPTION_V3", "file:///nowhere/chance.pth")
    assert inception.published_weights() == path  # nothing is fetched again


def test_without_a_network_the_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fidelity, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights-inception-6726825d.pth")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError) as caught:
        open_extractor("inception")
    message = str(caught.value)
    assert str(tmp_path / "checkpoints" / "weights-inception-6726825d.pth") in message
    assert "cannot be downloaded" in message and "\n" not in message
    assert "http://127.0.0.1:9/weights-inception-6726825d.pth" in caught.value.hint
    assert "--extractor-weights FILE" in caught.value.hint


class Trap:
    """What a file must not be able to run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def test_files_that_are_no_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / name for name in ("trap.pth", "text.pth", "list.pth", "other.pth")]
    paths[0].write_bytes(pickle.dumps({"x": Trap()}, protocol=2))
    paths[1].write_text("no weights")
    torch.save([torch.zeros(1)], paths[2])
    torch.save({"x": torch.zeros(1)}, paths[3])
    words = ("cannot read", "cannot read", "holds no weights", "holds other weights")
    for path, word in zip(paths, words, strict=True):
        with pytest.raises(UserError, match=word) as caught:
            open_extractor("inception", weights=path)
        assert "\n" not in str(caught.value) and "--extractor-weights FILE" in caught.value.hint
    assert not (tmp_path / "trapped").exists()


def test_double_sums_of_single_features(looked: tuple[Observations, Observations]) -> None:
    """Means of the float32 features are float64, and no float32 mean is near enough to pass for one."""
    found = looked[0]
    assert found.features is not None and found.features.dtype == torch.float32
    exact = FeatureStatistics()
    exact.add(found.features)
    assert found.statistics.mean.dtype == found.statistics.covariance.dtype == torch.float64
    torch.testing.assert_close(found.statistics.mean, exact.mean, rtol=1e-14, atol=0)
    assert (found.features.mean(dim=0).double() - exact.mean).abs().max() > 1e-9

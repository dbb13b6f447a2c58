"""Statistics of features in batches, and the Fréchet distance of Gaussians whose answer is known."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from hmar_cli.evaluation.frechet import FeatureStatistics, frechet_distance


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(features: Tensor, *sizes: int) -> FeatureStatistics:
    found = FeatureStatistics()
    for part in features.split(list(sizes) or [len(features)]):
        found.add(part)
    return found


def distance(first: Tensor, second: Tensor) -> float:
    ours, theirs = statistics(first), statistics(second)
    return frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)


def test_batches_give_the_statistics_of_the_whole() -> None:
    features = random(50, 6) * torch.arange(1, 7)
    for sizes in ((50,), (1, 1, 30, 0, 18), (49, 1)):
        found = statistics(features, *sizes)
        assert found.count == 50
        torch.testing.assert_close(found.mean, features.mean(dim=0))
        torch.testing.assert_close(found.covariance, features.T.cov())


def test_large_means_cost_no_digits() -> None:
    features = random(400, 3)
    shifted = statistics(features + 1e7, *[20] * 20)
    torch.testing.assert_close(shifted.covariance, features.T.cov(), rtol=1e-7, atol=1e-7)


def test_half_precision_is_summed_in_double() -> None:
    features = random(64, 4).half()
    found = statistics(features, 32, 32)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    torch.testing.assert_close(found.covariance, features.double().T.cov())


def test_the_closed_form_of_gaussians_with_common_axes() -> None:
    """Covariances that commute: |m1 - m2|^2 + sum of (s1 - s2)^2 over the axes."""
    axes = torch.linalg.qr(random(5, 5)).Q
    spread1, spread2 = torch.tensor([1.0, 2, 0, 4, 0.5]).double(), torch.tensor([3.0, 2, 1, 0, 0.1]).double()
    cov1, cov2 = ((axes * spread.square()) @ axes.T for spread in (spread1, spread2))
    mean1, mean2 = random(5, seed=1), random(5, seed=2)
    expected = (mean1 - mean2).square().sum() + (spread1 - spread2).square().sum()
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected.item(), rel=1e-12)


def test_the_closed_form_of_two_dimensions() -> None:
    """Covariances that don't commute: of 2 x 2, the trace of the root is sqrt(trace + 2 sqrt(determinant))."""
    cov1, cov2 = (each @ each.T for each in (random(2, 2, seed=3), random(2, 2, seed=4)))
    product = cov1 @ cov2
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (cov1.trace() + cov2.trace() - 2 * root).item()
    assert not torch.allclose(product, cov2 @ cov1)
    assert frechet_distance(torch.zeros(2), cov1, torch.zeros(2), cov2) == pytest.approx(expected, rel=1e-10)


def test_scipys_square_root_of_matrices_agrees() -> None:
    for count1, count2, width in ((40, 30, 7), (300, 200, 24)):
        sets = random(count1, width, seed=5) * torch.arange(1, width + 1), random(count2, width, seed=6) + 0.5
        ours, theirs = (statistics(each) for each in sets)
        covariances = [np.cov(each.numpy(), rowvar=False) for each in sets]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
        means = [each.numpy().mean(axis=0) for each in sets]
        expected = np.square(means[0] - means[1]).sum() + np.trace(
            covariances[0] + covariances[1] - 2 * root.real
        )
        found = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
        assert found == pytest.approx(expected, rel=1e-9)


def test_parts_join_to_the_whole() -> None:
    features = random(37, 5) + 100
    parts = [statistics(each) for each in features.split([20, 1, 16])]
    joined = FeatureStatistics()
    for part in (FeatureStatistics(), parts[2], FeatureStatistics(), parts[0], parts[1]):
        joined.join(part)
    whole = statistics(features)
    assert joined.count == 37
    torch.testing.assert_close(joined.mean, whole.mean)
    torch.testing.assert_close(joined.covariance, whole.covariance)
    assert parts[2].count == 16  # what was joined first is not changed by what came later
    torch.testing.assert_close(parts[2].mean, features[21:].mean(dim=0))
    with pytest.raises(ValueError, match=r"expected features \[B, 5\], got \[B, 4\]"):
        joined.join(statistics(random(3, 4)))


def test_moments_of_others_go_on() -> None:
    features = random(30, 4)
    found = FeatureStatistics.of_moments(features[:20].mean(dim=0), features[:20].T.cov(), 20)
    torch.testing.assert_close(found.covariance, features[:20].T.cov())
    found.add(features[20:])
    torch.testing.assert_close(found.covariance, features.T.cov())
    single = FeatureStatistics.of_moments(torch.zeros(3), torch.eye(3), 5)
    assert single.mean.dtype == single.covariance.dtype == torch.float64
    for mean, covariance, count, words in (
        (torch.zeros(3), torch.eye(4), 5, "covariance"),
        (torch.zeros(3), torch.eye(3), 1, "2 images"),
        (torch.full((3,), float("nan")), torch.eye(3), 5, "finite"),
        (torch.zeros(3), torch.ones(3, 3).triu(), 5, "symmetric"),
    ):
        with pytest.raises(ValueError, match=words):
            FeatureStatistics.of_moments(mean, covariance, count)


def test_sets_of_images() -> None:
    features = random(300, 8)
    assert distance(features, features.flip(0)) == pytest.approx(0, abs=1e-10)
    assert distance(features, features + 2) == pytest.approx(8 * 4, rel=1e-10)
    assert distance(features, 3 * features + 1) == pytest.approx(distance(3 * features + 1, features))
    few = features[:5]  # fewer images than features: covariances are singular
    assert distance(few, few) == pytest.approx(0, abs=1e-10)
    assert distance(few, random(5, 8, seed=9)) > 1


def test_what_cannot_be_measured_is_refused() -> None:
    found = statistics(random(1, 4))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = found.covariance
    with pytest.raises(ValueError, match=r"expected features \[B, 4\], got \[2, 3\]"):
        found.add(random(2, 3))
    with pytest.raises(ValueError, match="finite"):
        found.add(torch.full((1, 4), float("nan")))
    with pytest.raises(ValueError, match="of one F"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))

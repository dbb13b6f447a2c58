"""The Fréchet distance of two sets of images, by mean and covariance of their features (Heusel et al. 2017).

Letters: B batch, F features of an image.
"""

import torch
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of features that come in batches; nothing else is kept.

    All sums are float64 and on the device of the features. A batch is joined to what came before by the rule of
    Chan et al. (1979), which loses no digits where means are large.

    Attributes:
        count: images so far.
        mean: [F], float64, once there are any.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._scatter = torch.zeros(())  # [F], [F, F] after the first batch

    def add(self, features: Tensor) -> None:
        """Take features [B, F] of B images in.

        Raises:
            ValueError: another shape, or numbers that are not finite.
        """
        if features.ndim != 2 or (self.count and features.shape[1] != len(self.mean)):
            wanted = f"[B, {len(self.mean)}]" if self.count else "[B, F]"
            raise ValueError(f"expected features {wanted}, got {list(features.shape)}")
        if not features.isfinite().all():
            raise ValueError("expected finite features, got some that are not")
        if not len(features):
            return
        rows = features.double()
        batch = FeatureStatistics()
        batch.count, batch.mean = len(rows), rows.mean(dim=0)  # [F]
        batch._scatter = (rows - batch.mean).T @ (rows - batch.mean)  # [F, F]
        self.join(batch)

    def join(self, other: "FeatureStatistics") -> None:
        """Take in what others found in other images, by the same rule.

        Raises:
            ValueError: features of another width.
        """
        if not other.count:
            return
        if not self.count:
            self.count, self.mean, self._scatter = other.count, other.mean, other._scatter
            return
        mean, scatter = other.mean.to(self.mean.device), other._scatter.to(self.mean.device)
        if mean.shape != self.mean.shape:
            raise ValueError(f"expected features [B, {len(self.mean)}], got [B, {len(mean)}]")
        total, step = self.count + other.count, mean - self.mean
        apart = torch.outer(step, step) * (self.count * other.count / total)  # [F, F]
        self._scatter = self._scatter + scatter + apart
        self.mean, self.count = self.mean + step * (other.count / total), total

    @classmethod
    def of_moments(cls, mean: Tensor, covariance: Tensor, count: int) -> "FeatureStatistics":
        """Statistics that someone else computed.

        Args:
            mean: [F].
            covariance: [F, F], with count - 1 below the fraction.
            count: of the images, at least 2.

        Raises:
            ValueError: other shapes, numbers that are not finite, or a covariance that is not symmetric.
        """
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or count < 2:
            shapes = [list(mean.shape), list(covariance.shape)]
            raise ValueError(
                f"expected a mean [F], a covariance [F, F] and 2 images or more, got {shapes}, {count}"
            )
        mean, covariance = mean.double(), covariance.double()
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("expected finite statistics, got some that are not")
        if not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * float(covariance.abs().max())):
            raise ValueError("expected a symmetric covariance")
        found = cls()
        found.count, found.mean, found._scatter = count, mean, covariance * (count - 1)
        return found

    def cpu(self) -> "FeatureStatistics":
        """The same on the CPU."""
        found = FeatureStatistics()
        found.count, found.mean, found._scatter = self.count, self.mean.cpu(), self._scatter.cpu()
        return found

    def distance(self, other: "FeatureStatistics") -> float:
        """The `frechet_distance` of two sets of images.

        Raises:
            ValueError: fewer than two images in one of them, or features of another width.
        """
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)

    @property
    def covariance(self) -> Tensor:
        """[F, F], float64, with count - 1 below the fraction.

        Raises:
            ValueError: fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"expected at least 2 images, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Fréchet distance of two Gaussians: |mean1 - mean2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)).

    The trace of the root is the sum of the singular values of root(cov1) root(cov2), which holds for singular
    covariances too and squares no small number.

    Args:
        mean1: [F].
        cov1: [F, F], symmetric and without negative eigenvalues but for rounding.
        mean2: [F].
        cov2: [F, F].

    Returns:
        The squared distance, as FID states it; at least 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    width = len(mean1)
    shapes = [tuple(each.shape) for each in (mean1, cov1, mean2, cov2)]
    if shapes != [(width,), (width, width)] * 2:
        raise ValueError(f"expected means [F] and covariances [F, F] of one F, got {shapes}")
    mean1, cov1, mean2, cov2 = (each.detach().double().cpu() for each in (mean1, cov1, mean2, cov2))
    shared = torch.linalg.svdvals(_root(cov1) @ _root(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared
    return max(float(distance), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root [F, F] of a covariance, by its eigenvalues."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root

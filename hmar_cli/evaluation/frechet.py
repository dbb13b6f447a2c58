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
        mean = rows.mean(dim=0)  # [F]
        scatter = (rows - mean).T @ (rows - mean)  # [F, F]
        total, step = self.count + len(rows), mean - self.mean
        apart = torch.outer(step, step) * (self.count * len(rows) / total)  # 0 for the first batch
        self._scatter = self._scatter + scatter + apart
        self.mean, self.count = self.mean + step * (len(rows) / total), total

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

"""Frechet distance: how far two clouds of feature vectors lie apart, each taken for a Gaussian (Heusel et al.
2017).

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

With features of Inception (inception.py) it is FID. It falls with the number of images, so only distances of
the same number compare, and it means little with fewer images than features.

    B vectors of a batch, N of all, D features
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureGaussian:
    """Mean (D,) and covariance (D, D) of N vectors, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor
    count: int


class RunningCovariance:
    """Mean and covariance of vectors that come in batches; float64, and no vector is kept.

    Batches are joined as by Chan et al. (1979): the products are of what lies about the mean, so large means
    cost no digits.
    """

    def __init__(self):
        self.count, self.mean, self.products = 0, torch.zeros(()), torch.zeros(())

    def add(self, vectors: Tensor) -> None:
        """Takes (B, D); ValueError for other shapes or values that are not finite."""
        if vectors.ndim != 2 or (self.count and vectors.shape[1] != len(self.mean)):
            raise ValueError(f"expected vectors (B, D) of one width, got {tuple(vectors.shape)}")
        vectors = vectors.detach().cpu().double()
        if not torch.isfinite(vectors).all():
            raise ValueError("a feature is not finite; is the extractor given the right weights?")
        if not len(vectors):
            return
        mean = vectors.mean(0)
        products = (vectors - mean).T @ (vectors - mean)
        count, apart = self.count + len(vectors), mean - self.mean
        self.products = (
            self.products + products + torch.outer(apart, apart) * (self.count * len(vectors) / count)
        )
        self.mean = self.mean + apart * (len(vectors) / count)
        self.count = count

    def gaussian(self) -> FeatureGaussian:
        """Mean and covariance; it divides by N - 1, as numpy's and Heusel's."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two vectors or more, got {self.count}")
        return FeatureGaussian(self.mean, self.products / (self.count - 1), self.count)


def frechet_distance(a: FeatureGaussian, b: FeatureGaussian) -> float:
    """The distance by the formula above.

    The trace of the root is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: no complex numbers come up
    and nothing is added to a singular covariance.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of different widths: {len(a.mean)} and {len(b.mean)}")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return max(0.0, float(distance))

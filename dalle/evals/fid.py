"""FID and inception score from features and logits.

FID (Heusel et al. 2017) is the Frechet distance of Gaussians fitted to Inception features:

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

It falls with the number of images, so only distances of the same number compare. The inception score
(Salimans et al. 2016) is exp(mean of KL(p(class | image), p(class))).

    B vectors of a batch, N of all, D features
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPLITS = 10  # of the inception score, Salimans et al.


@dataclass(frozen=True)
class FeatureGaussian:
    """Mean (D,) and covariance (D, D) of N vectors, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor
    count: int


class RunningCovariance:
    """Mean and covariance of vectors that come in batches, in float64; no vector is kept.

    Products are of differences from the mean (Chan et al. 1979), so that large means cost no digits.
    """

    def __init__(self):
        self.count, self.mean, self.products = 0, torch.zeros(()), torch.zeros(())

    def add(self, vectors: Tensor) -> None:
        """Adds (B, D); ValueError for other shapes or values that are not finite."""
        if vectors.ndim != 2 or (self.count and vectors.shape[1] != len(self.mean)):
            raise ValueError(f"expected vectors (B, D) of one width, got {tuple(vectors.shape)}")
        vectors = vectors.detach().cpu().double()
        if not torch.isfinite(vectors).all():
            raise ValueError("a feature is not finite; is the extractor given the right weights?")
        if not len(vectors):
            return
        mean, count = vectors.mean(0), self.count + len(vectors)
        shift = mean - self.mean
        between = torch.outer(shift, shift) * (self.count * len(vectors) / count)
        self.products = self.products + (vectors - mean).T @ (vectors - mean) + between
        self.mean = self.mean + shift * (len(vectors) / count)
        self.count = count

    def gaussian(self) -> FeatureGaussian:
        """Mean and covariance, which divides by N - 1 as in numpy and Heusel et al."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two vectors or more, got {self.count}")
        return FeatureGaussian(self.mean, self.products / (self.count - 1), self.count)


def frechet_distance(a: FeatureGaussian, b: FeatureGaussian) -> float:
    """The Frechet distance; tr (A B)^(1/2) is that of the symmetric (A^(1/2) B A^(1/2))^(1/2)."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of different widths: {len(a.mean)} and {len(b.mean)}")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return max(0.0, float(distance))


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the score of logits (N, classes) over shuffled parts."""
    if logits.ndim != 2 or len(logits) < splits or splits < 1:
        raise ValueError(f"{splits} parts need as many logits (N, classes), got {tuple(logits.shape)}")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in logits.cpu().double()[order].tensor_split(splits):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))

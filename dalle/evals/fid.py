"""FID and inception score of images behind each blur (Section 3.1, Figure 9).

FID (Heusel et al. 2017) is the Frechet distance of Gaussians fitted to Inception features:

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

It falls with the number of images, so only distances of the same number compare. The inception score
(Salimans et al. 2016) is exp(mean of KL(p(class | image), p(class))).

    B images of a batch, N of all, D features
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.evals.config import RADII
from dalle.evals.networks import Extractor
from dalle.evals.psnr_ssim import blur
from dalle.io.files import make_directory, read_tensors, write_tensors

SPLITS = 10  # of the inception score, Salimans et al.


@dataclass(frozen=True)
class FeatureGaussian:
    """Mean (D,) and covariance (D, D) of N features, float64 on the CPU, and N."""

    mean: Tensor
    covariance: Tensor
    count: Tensor


class FeatureStats:
    """Mean and covariance, in float64, of features that come in batches, and their logits.

    Products are of differences from the mean (Chan et al. 1979), so that large means cost no digits.
    """

    def __init__(self):
        self.count, self.mean, self.products = 0, torch.zeros(()), torch.zeros(())
        self.logits: list[Tensor] = []

    def add(self, features: Tensor, logits: Tensor | None = None) -> None:
        """Adds (B, D) and any logits (B, classes); ValueError for values that are not finite."""
        features = features.detach().cpu().double()
        if not torch.isfinite(features).all():
            raise ValueError("a feature is not finite; is the extractor given the right weights?")
        mean, count = features.mean(0), self.count + len(features)
        shift = mean - self.mean
        between = torch.outer(shift, shift) * (self.count * len(features) / count)
        self.products = self.products + (features - mean).T @ (features - mean) + between
        self.mean = self.mean + shift * (len(features) / count)
        self.count = count
        self.logits += [] if logits is None else [logits]

    def gaussian(self) -> FeatureGaussian:
        """Mean and covariance, which divides by N - 1 as in numpy and Heusel et al."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two features or more, got {self.count}")
        return FeatureGaussian(self.mean, self.products / (self.count - 1), torch.tensor(self.count))


def frechet_distance(a: FeatureGaussian, b: FeatureGaussian) -> float:
    """The Frechet distance; tr (A B)^(1/2) is that of the symmetric (A^(1/2) B A^(1/2))^(1/2)."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return max(0.0, float(distance))


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the score of logits (N, classes) over shuffled parts."""
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(f"{splits} parts need as many logits (N, classes), got {tuple(logits.shape)}")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in logits.cpu().double()[order].tensor_split(splits):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))


def extract_stats(
    extractor: Extractor, batches: Iterable[Tensor], radii: Sequence[float] = RADII
) -> dict[float, FeatureStats]:
    """Statistics by radius of pixels (B, 3, H, W) in [0, 1] behind each blur."""
    stats = {radius: FeatureStats() for radius in radii}
    for pixels in batches:
        for radius in radii:
            stats[radius].add(*extractor(blur(pixels, radius).clamp(0, 1)))
    return stats


def compare(
    generated: dict[float, FeatureStats],
    real: dict[float, FeatureGaussian],
    metric: str = "fid",
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """By radius: the Frechet distance as `metric`, and inception_score with its deviation over splits."""
    report = {}
    for radius, stats in generated.items():
        report[f"{radius:g}"] = scores = {metric: frechet_distance(stats.gaussian(), real[radius])}
        if stats.logits:
            logits = torch.cat(stats.logits)
            mean, deviation = inception_score(logits, min(SPLITS, len(logits)), seed)
            scores |= {"inception_score": mean, "inception_score_std": deviation}
    return report


def cached_reference_stats(
    extractor: Extractor,
    batches: Callable[[], Iterable[Tensor]],
    facts: dict[str, Any],
    folder: Path,
    radii: Sequence[float] = RADII,
) -> tuple[dict[float, FeatureGaussian], str]:
    """Statistics of real images by radius, from the folder or computed and saved there, and a hash of them.

    `facts` are what they depend on apart from the extractor: which images, how many, their size.
    """
    facts = facts | {"extractor": extractor.hash}
    keys = {radius: _hash(json.dumps(facts | {"radius": radius}, sort_keys=True)) for radius in radii}
    paths = {radius: folder / f"{key}.safetensors" for radius, key in keys.items()}
    stats = {radius: _read(path) for radius, path in paths.items()}
    if missing := [radius for radius in radii if stats[radius] is None]:
        make_directory(folder)
        for radius, computed in extract_stats(extractor, batches(), missing).items():
            stats[radius] = computed.gaussian()
            write_tensors(paths[radius], vars(stats[radius]))
    return stats, _hash("".join(keys.values()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path) -> FeatureGaussian | None:
    """None without a whole file."""
    try:
        return FeatureGaussian(**read_tensors(path))
    except (ValueError, TypeError):
        return None

"""FID and inception score of generated images behind each blur (Section 3.1, Figure 9).

Statistics of real images are the same for every model; a folder caches them by a hash of their inputs.

    B images of a batch, D features
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.evals.config import RADII
from dalle.evals.fid import SPLITS, FeatureGaussian, RunningCovariance, frechet_distance, inception_score
from dalle.evals.networks import Extractor
from dalle.evals.psnr_ssim import blur
from dalle.io.files import make_directory, read_json, read_tensors, write_json, write_tensors


class ImageStats:
    """Moments of the features of images, and logits where there are any."""

    def __init__(self):
        self.moments, self.logits = RunningCovariance(), []

    def add(self, features: Tensor, logits: Tensor | None) -> None:
        """Adds a batch."""
        self.moments.add(features)
        if logits is not None:
            self.logits.append(logits)


def extract_stats(
    extractor: Extractor, batches: Iterable[Tensor], radii: Sequence[float] = RADII
) -> dict[float, ImageStats]:
    """Statistics by radius of pixels (B, 3, H, W) in [0, 1] behind each blur."""
    stats = {radius: ImageStats() for radius in radii}
    for pixels in batches:
        for radius in radii:
            stats[radius].add(*extractor(blur(pixels, radius).clamp(0, 1)))
    return stats


def compare(
    generated: dict[float, ImageStats], real: dict[float, FeatureGaussian], metric: str = "fid", seed: int = 0
) -> dict[str, dict[str, float]]:
    """By radius: the Frechet distance as `metric`, and inception_score with its deviation over splits."""
    report = {}
    for radius, stats in generated.items():
        report[f"{radius:g}"] = scores = {metric: frechet_distance(stats.moments.gaussian(), real[radius])}
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

    `facts` are what they depend on beside the extractor: which images, how many, their size.
    """
    described = {radius: facts | {"extractor": extractor.hash, "radius": radius} for radius in radii}
    paths = {radius: folder / _hash(json.dumps(one, sort_keys=True)) for radius, one in described.items()}
    stats = {radius: _read(path) for radius, path in paths.items()}
    if missing := [radius for radius in radii if stats[radius] is None]:
        make_directory(folder)
        for radius, computed in extract_stats(extractor, batches(), missing).items():
            stats[radius] = gaussian = computed.moments.gaussian()
            tensors = {"mean": gaussian.mean, "covariance": gaussian.covariance}
            write_tensors(paths[radius].with_suffix(".safetensors"), tensors)
            write_json(paths[radius].with_suffix(".json"), described[radius] | {"count": gaussian.count})
    return stats, _hash("".join(path.name for path in paths.values()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path) -> FeatureGaussian | None:
    """None without a whole pair of files; the JSON is written last."""
    try:
        count = read_json(path.with_suffix(".json"))["count"]
        return FeatureGaussian(**read_tensors(path.with_suffix(".safetensors")), count=count)
    except (ValueError, OSError, KeyError, TypeError):
        return None

"""FID and inception score of generated images behind each blur (Section 3.1, Figure 9).

Statistics of the real images are the same for every model, so a folder caches them by the hash of all they
depend on.

    B images of a batch, D features
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dalle.evals.blur import blur
from dalle.evals.config import RADII
from dalle.evals.fid import FeatureGaussian, RunningCovariance, frechet_distance
from dalle.evals.inception_score import SPLITS, inception_score
from dalle.io.files import make_directory, read_json, read_tensors, write_json, write_tensors
from dalle.types import Embedder


class Extractor(Protocol):
    """Pixels (B, 3, H, W) in [0, 1] -> features (B, D) and logits of classes (B, C), or None where it has
    none."""

    hash: str
    resize: str
    metric: str
    """Name of the Frechet distance in its space: fid, or fd_clip."""

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]: ...


class CLIPFeatures:
    """Embeddings of a CLIP in place of Inception features: their distance is no FID, and there is no IS."""

    metric = "fd_clip"

    resize = "bicubic with antialiasing to the CLIP's size"

    def __init__(self, clip: Embedder, clip_hash: str):
        self.clip, self.hash = clip, clip_hash

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, None]:
        return self.clip.embed_images(pixels).float().cpu(), None


class ImageStats:
    """Statistics of images at one blur: moments of the features, and logits where there are any."""

    def __init__(self):
        self.moments, self.logits = RunningCovariance(), []

    def add(self, features: Tensor, logits: Tensor | None) -> None:
        """Adds a batch."""
        self.moments.add(features)
        self.logits += [] if logits is None else [logits]


def extract_stats(
    extractor: Extractor, batches: Iterable[Tensor], radii: Sequence[float] = RADII
) -> dict[float, ImageStats]:
    """Statistics of pixels (B, 3, H, W) in [0, 1] behind each blur."""
    found = {radius: ImageStats() for radius in radii}
    for pixels in batches:
        for radius, measured in found.items():
            measured.add(*extractor(blur(pixels, radius).clamp(0, 1)))
    return found


def compare(
    generated: dict[float, ImageStats], real: dict[float, FeatureGaussian], metric: str = "fid", seed: int = 0
) -> dict[str, dict[str, float]]:
    """By radius: the Frechet distance as `metric`, and inception_score with its standard deviation over
    splits."""
    report = {}
    for radius, measured in generated.items():
        scores = {metric: frechet_distance(measured.moments.gaussian(), real[radius])}
        if measured.logits:
            logits = torch.cat(measured.logits)
            mean, deviation = inception_score(logits, min(SPLITS, len(logits)), seed)
            scores |= {"inception_score": mean, "inception_score_std": deviation}
        report[f"{radius:g}"] = scores
    return report


def cached_reference_stats(
    extractor: Extractor,
    batches: Callable[[], Iterable[Tensor]],
    facts: dict[str, Any],
    folder: Path,
    radii: Sequence[float] = RADII,
) -> tuple[dict[float, FeatureGaussian], str]:
    """Statistics of real images, from the folder, or computed and saved there.

    Args:
        extractor: its hash is part of the key.
        batches: called for the images where they are needed.
        facts: what else the statistics depend on: which images, how many, their size.
        folder: a file of tensors and one of facts for each radius.

    Returns:
        by radius, and a hash of them all.
    """
    keys = {radius: _key(facts | {"extractor": extractor.hash, "radius": radius}) for radius in radii}
    found = {radius: _read(folder, key) for radius, key in keys.items()}
    if missing := [radius for radius in radii if found[radius] is None]:
        make_directory(folder)
        for radius, measured in extract_stats(extractor, batches(), missing).items():
            found[radius] = measured.moments.gaussian()
            _write(
                folder, keys[radius], found[radius], facts | {"extractor": extractor.hash, "radius": radius}
            )
    return found, hashlib.sha256("".join(keys.values()).encode()).hexdigest()[:16]


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _read(folder: Path, key: str) -> FeatureGaussian | None:
    """None where there is none, or a truncated file."""
    if not (folder / f"{key}.json").is_file():  # written last
        return None
    try:
        tensors = read_tensors(folder / f"{key}.safetensors")
        return FeatureGaussian(
            tensors["mean"], tensors["covariance"], read_json(folder / f"{key}.json")["count"]
        )
    except (ValueError, KeyError):
        return None


def _write(folder: Path, key: str, gaussian: FeatureGaussian, facts: dict[str, Any]) -> None:
    write_tensors(folder / f"{key}.safetensors", {"mean": gaussian.mean, "covariance": gaussian.covariance})
    write_json(folder / f"{key}.json", facts | {"count": gaussian.count})

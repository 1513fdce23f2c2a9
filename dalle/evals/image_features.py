"""Drawn images beside real ones: Frechet distance and inception score behind each blur (section 3.1, Figure 9).

Statistics of the real images take as long as those of the drawn ones and are the same for every model, so they are
kept in a folder, by the hash of all that they depend on.

    B images of a batch, D features
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dalle.evals.blur import RADII, blur
from dalle.evals.fid import Gaussian, Moments, frechet_distance
from dalle.evals.inception_score import SPLITS, inception_score
from dalle.io.files import make_directory, read_json, read_tensors, write_json, write_tensors
from dalle.types import Embedder


class Extractor(Protocol):
    """Pixels (B, 3, H, W) in [0, 1] -> features (B, D) and logits of classes (B, C), or None where it has none."""

    hash: str
    resize: str

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]: ...


class CLIPFeatures:
    """The space of a CLIP in Inception's place: a distance of its own, no FID, and without classes no IS."""

    resize = "bicubic with antialiasing to the CLIP's size"

    def __init__(self, clip: Embedder, clip_hash: str):
        self.clip, self.hash = clip, clip_hash

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, None]:
        return self.clip.embed_images(pixels).float().cpu(), None


class Measured:
    """What is kept of images at one blur: moments of the features, and logits where there are any."""

    def __init__(self):
        self.moments, self.logits = Moments(), []

    def add(self, features: Tensor, logits: Tensor | None) -> None:
        """Takes a batch."""
        self.moments.add(features)
        self.logits += [] if logits is None else [logits]


def measure(
    extractor: Extractor, batches: Iterable[Tensor], radii: Sequence[float] = RADII
) -> dict[float, Measured]:
    """Pixels (B, 3, H, W) in [0, 1], behind each blur."""
    found = {radius: Measured() for radius in radii}
    for pixels in batches:
        for radius, measured in found.items():
            measured.add(*extractor(blur(pixels, radius).clamp(0, 1)))
    return found


def compare(
    drawn: dict[float, Measured], real: dict[float, Gaussian], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Per radius: frechet_distance, and inception_score with inception_score_std over its parts."""
    report = {}
    for radius, measured in drawn.items():
        scores = {"frechet_distance": frechet_distance(measured.moments.gaussian(), real[radius])}
        if measured.logits:
            logits = torch.cat(measured.logits)
            mean, deviation = inception_score(logits, min(SPLITS, len(logits)), seed)
            scores |= {"inception_score": mean, "inception_score_std": deviation}
        report[f"{radius:g}"] = scores
    return report


def reference(
    extractor: Extractor,
    batches: Callable[[], Iterable[Tensor]],
    facts: dict[str, Any],
    folder: Path,
    radii: Sequence[float] = RADII,
) -> tuple[dict[float, Gaussian], str]:
    """Statistics of real images, from the folder or computed and put there.

    Args:
        extractor: its hash is part of the key.
        batches: gives the images, where they are needed.
        facts: what else the statistics depend on: which images, how many, their size.
        folder: where they are kept, a file of numbers and one of facts for each radius.

    Returns:
        by radius, and a hash of them all.
    """
    keys = {radius: _key(facts | {"extractor": extractor.hash, "radius": radius}) for radius in radii}
    found = {radius: _read(folder, key) for radius, key in keys.items()}
    if missing := [radius for radius in radii if found[radius] is None]:
        make_directory(folder)
        for radius, measured in measure(extractor, batches(), missing).items():
            found[radius] = measured.moments.gaussian()
            _write(
                folder, keys[radius], found[radius], facts | {"extractor": extractor.hash, "radius": radius}
            )
    return found, hashlib.sha256("".join(keys.values()).encode()).hexdigest()[:16]


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _read(folder: Path, key: str) -> Gaussian | None:
    """None where there is none, or a file that broke off."""
    if not (folder / f"{key}.json").is_file():  # written last
        return None
    try:
        tensors = read_tensors(folder / f"{key}.safetensors")
        return Gaussian(tensors["mean"], tensors["covariance"], read_json(folder / f"{key}.json")["count"])
    except (ValueError, KeyError):
        return None


def _write(folder: Path, key: str, gaussian: Gaussian, facts: dict[str, Any]) -> None:
    write_tensors(folder / f"{key}.safetensors", {"mean": gaussian.mean, "covariance": gaussian.covariance})
    write_json(folder / f"{key}.json", facts | {"count": gaussian.count})

"""Captioned pictures by number: the embedded shapes, or a folder of pictures with text files.

B batch, R resolution
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle.data.shapes import ShapesPairs
from dalle.data.transforms import transform
from dalle.images import load_image
from dalle.rng import epoch_stream, generator
from dalle.types import Pairs

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class PairsConfig:
    """Where pictures and captions come from."""

    path: str | None = None
    """A folder of pictures, each with its captions in a .txt beside it (one a line), or the word
    "shapes" for the embedded set."""
    resolution: int = 256
    """Pixels on a side (2.1)."""
    held_out: float = 0.05
    """Share of a folder's pictures kept for evaluation, chosen by name."""
    seed: int = 0
    """Which drawing of the shapes set."""

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")


def open_pairs(config: PairsConfig, split: str = "train", siblings: bool = False, pictures: bool = True) -> Pairs:
    """The pairs of a split, "train" or "held_out" ("new_pairs" too for shapes).

    Args:
        config: which set.
        split: which part.
        siblings: for shapes, every second picture differs from the one before in one attribute.
        pictures: look at the pictures of a folder at once, so that a bad one is named before work begins.
    """
    if config.path is None:
        raise ValueError("no data: give --data.path FOLDER, or --data.path shapes for the embedded set")
    if config.path == "shapes":
        return ShapesPairs(config.resolution, config.seed, split, siblings)
    smallest = {"train": config.resolution}.get(split, 8) if pictures else 0
    return FolderPairs(Path(config.path), config.resolution, split, config.held_out, smallest)


def pixels_of_samples(pairs: Pairs, samples: Sequence[tuple[int, int]], augment: str, seed: int) -> Tensor:
    """Pixels (B, 3, R, R) of (epoch, index) samples; a crop depends on (seed, epoch, index) alone."""
    if pairs.size is None:
        return torch.from_numpy(pairs.pixels([index for _, index in samples]))
    parts = [pairs.pixels([index], augment, epoch_stream(seed, epoch)) for epoch, index in samples]
    return torch.from_numpy(np.concatenate(parts))


class FolderPairs:
    """Pictures below a folder, each with a caption file of the same stem in the same folder.

    Pictures without captions are left out and counted in `without_caption`. With `smallest`, pictures that are
    none, or have fewer pixels on a side, are refused at once.
    """

    def __init__(self, folder: Path, resolution: int, split: str, held_out: float, smallest: int = 0):
        if split not in ("train", "held_out"):
            raise ValueError(f"unknown split {split!r}; expected train or held_out")
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}; expected pictures with a .txt of the same name beside each")
        pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        texts = {p: p.with_suffix(".txt") for p in pictures if p.with_suffix(".txt").is_file()}
        self.without_caption = len(pictures) - len(texts)
        if not texts:
            raise ValueError(
                f"{folder} has {len(pictures)} pictures ({', '.join(SUFFIXES)}), none with a .txt of the same name"
            )
        chosen = {p: t for p, t in texts.items() if (_share(p, folder) < held_out) == (split == "held_out")}
        if not chosen:
            raise ValueError(f"{folder}: none of {len(texts)} pairs falls into split {split!r}; raise --data.held-out")
        self.paths = list(chosen)
        if smallest:
            _check_headers(self.paths, smallest)
        self.size = len(self.paths)
        names = "\n".join(path.relative_to(folder).as_posix() for path in self.paths)
        self.hash = hashlib.blake2b(names.encode(), digest_size=8).hexdigest()
        self.resolution = resolution
        self._captions = [_read_captions(text) for text in chosen.values()]

    def pixels(self, indices: Sequence[int], augment: str = "none", seed: int = 0) -> np.ndarray:
        """float32 (B, 3, R, R) in [0, 1]; crops are drawn from (seed, index)."""
        pictures = [self._picture(index, augment, seed) for index in indices]
        return np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32) / 255

    def _picture(self, index: int, augment: str, seed: int) -> np.ndarray:
        rng = generator("crop", seed, index)
        try:
            return np.asarray(transform(load_image(self.paths[index]), self.resolution, augment, rng))
        except ValueError as error:
            raise ValueError(f"{self.paths[index]}: {error}") from None

    def captions(self, indices: Sequence[int]) -> list[list[str]]:
        """Every caption of each picture."""
        return [self._captions[index] for index in indices]


def _check_headers(paths: Sequence[Path], smallest: int) -> None:
    """Opens every picture's header before work begins; ValueError names those that are none, or too small."""
    bad = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if min(image.size) < smallest:
                    bad.append(f"{path} ({image.width} x {image.height} is smaller than {smallest})")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            bad.append(f"{path} (not a picture)")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"{len(bad)} of {len(paths)} pictures cannot be used: {', '.join(bad[:5])}{more}; remove them")


def _share(path: Path, folder: Path) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.blake2b(path.relative_to(folder).as_posix().encode(), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32


def _read_captions(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    captions = [line for line in lines if line]
    if not captions:
        raise ValueError(f"{path} holds no caption; write one a line or remove the file")
    return captions

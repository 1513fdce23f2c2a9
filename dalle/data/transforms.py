"""Random crops of the paper (Listings 1 and 2), and the center crop of evaluation.

The resize is TensorFlow 1's by area with align_corners: pixel i of a row covers [i * scale, (i + 1) * scale)
of the image, scale = (size_in - 1) / (size_out - 1), and is the mean of what it covers, partly covered pixels
weighted by their fraction. The last one reaches beyond the image, whose last pixel is repeated. Values are
clipped, rounded half to even, and stored in 8 bits. Pillow's BOX and torch's mode="area" take whole pixels
only.

    R resolution, S side of the square taken, K pixels that a covered length touches at most
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from dalle.io.images import resize_center_crop

AUGMENTS = ("dvae", "transformer", "none")


@dataclass(frozen=True)
class Crop:
    """A square of the image, the side it is resized to, a square of that, and a flip."""

    left: int
    top: int
    side: int
    resized: int
    inner_left: int
    inner_top: int
    flip: bool = False


def dvae_crop(width: int, height: int, resolution: int, rng: np.random.Generator) -> Crop:
    """Listing 1: a square anywhere, resized to 9/8 to 12/8 of R, cropped to R, flipped half the time."""
    side = _side(width, height, resolution)
    left, top = rng.integers(width - side + 1), rng.integers(height - side + 1)
    low, high = min(side, round(9 / 8 * resolution)), min(side, round(12 / 8 * resolution))
    resized = rng.integers(low, high + 1)
    inner = rng.integers(resized - resolution + 1, size=2)
    flip = bool(rng.random() < 0.5)
    return Crop(int(left), int(top), side, int(resized), int(inner[0]), int(inner[1]), flip)


def transformer_crop(width: int, height: int, resolution: int, rng: np.random.Generator) -> Crop:
    """Listing 2: a square from the middle quarter of the slack, R to 9/8 R, cropped to R, no flip."""
    side = _side(width, height, resolution)
    left, top = (_middle(slack, rng) for slack in (width - side, height - side))
    resized = rng.integers(resolution, min(side, round(9 / 8 * resolution)) + 1)
    inner = rng.integers(resized - resolution + 1, size=2)
    return Crop(left, top, side, int(resized), int(inner[0]), int(inner[1]))


def _side(width: int, height: int, resolution: int) -> int:
    side = min(width, height)
    if side < resolution:
        raise ValueError(f"image of {width} x {height} is smaller than the resolution {resolution}")
    return side


def _middle(slack: int, rng: np.random.Generator) -> int:
    low = 3 * slack // 8
    return int(rng.integers(low, max(low + 1, 5 * slack // 8)))


def apply_crop(image: Image.Image, crop: Crop, resolution: int) -> Image.Image:
    """The R x R image that a crop of an RGB image describes."""
    box = (crop.left, crop.top, crop.left + crop.side, crop.top + crop.side)
    pixels = _resize_window(np.asarray(image.crop(box)), crop, resolution)
    pixels = pixels.clip(0, 255).round().astype(np.uint8)  # numpy rounds half to even too
    return Image.fromarray(pixels[:, ::-1] if crop.flip else pixels)


def _resize_window(square: np.ndarray, crop: Crop, resolution: int) -> np.ndarray:
    """The inner window of a resized square, and nothing else of it: uint8 (S, S, 3) -> float32 (R, R, 3)."""
    cells, weights = area_resize_weights(crop.side, crop.resized)
    rows, columns = (slice(start, start + resolution) for start in (crop.inner_top, crop.inner_left))
    first, last = cells[columns].min(), cells[columns].max() + 1
    lines = square[:, first:last].reshape(crop.side, -1)  # (S, columns touched * 3)
    lines = _weighted_sum(lines, cells[rows], weights[rows]).reshape(resolution, last - first, 3)
    lines = lines.swapaxes(0, 1).reshape(last - first, -1)  # (columns touched, R * 3)
    window = _weighted_sum(lines, cells[columns] - first, weights[columns])
    return window.reshape(-1, resolution, 3).swapaxes(0, 1)


def _weighted_sum(lines: np.ndarray, cells: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Line i of the result is the sum over k of weights[i, k] * lines[cells[i, k]]."""
    total = weights[:, :1] * lines[cells[:, 0]]
    for k in range(1, cells.shape[1]):
        total += weights[:, k, None] * lines[cells[:, k]]
    return total


@lru_cache(maxsize=1024)
def area_resize_weights(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of a row that each pixel of the resized row covers, and their weights.

    In single precision, as TensorFlow. Returns indices (size_out, K) and float32 weights (size_out, K) whose
    rows sum to 1.
    """
    scale = np.float32((size_in - 1) / (size_out - 1) if size_out > 1 else size_in)
    left, right = (np.arange(start, start + size_out, dtype=np.float32) * scale for start in (0, 1))
    start = np.floor(left).astype(np.int64)
    cells = start[:, None] + np.arange(int((np.ceil(right) - start).max()))
    weights = (np.minimum(cells + 1, right[:, None]) - np.maximum(cells, left[:, None])).clip(0) / scale
    cells, weights = cells.clip(0, size_in - 1), weights.astype(np.float32)
    cells.flags.writeable = weights.flags.writeable = False  # shared by the cache
    return cells, weights


def transform(image: Image.Image, resolution: int, augment: str, rng: np.random.Generator) -> Image.Image:
    """An R x R image by the listing of `augment`, or the center crop for "none"."""
    if augment == "none":
        return resize_center_crop(image, resolution)
    if augment not in AUGMENTS:
        raise ValueError(f"unknown augment {augment!r}; expected one of {', '.join(AUGMENTS)}")
    crop = (dvae_crop if augment == "dvae" else transformer_crop)(*image.size, resolution, rng)
    return apply_crop(image, crop, resolution)

"""Random crops of the paper (Listings 1 and 2) and the fixed crop of evaluation.

Where and how large is drawn exactly as listed. The resize by area is Pillow's box filter, which
weights pixels at the rim of a box by how much of them it covers, without the listings' align_corners.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dalle.images import shorter_side

AUGMENTS = ("dvae", "transformer", "none")


@dataclass(frozen=True)
class Crop:
    """A square of the picture, the side it is resized to, a square of that, and a flip."""

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
    return Crop(int(left), int(top), side, int(resized), int(inner[0]), int(inner[1]), bool(rng.random() < 0.5))


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
        raise ValueError(f"picture of {width} x {height} is smaller than the {resolution} x {resolution} asked for")
    return side


def _middle(slack: int, rng: np.random.Generator) -> int:
    low = 3 * slack // 8
    return int(rng.integers(low, max(low + 1, 5 * slack // 8)))


def apply_crop(image: Image.Image, crop: Crop, resolution: int) -> Image.Image:
    """The R x R picture that a crop describes."""
    box = (crop.left, crop.top, crop.left + crop.side, crop.top + crop.side)
    image = image.resize((crop.resized, crop.resized), Image.Resampling.BOX, box=box)
    x, y = crop.inner_left, crop.inner_top
    image = image.crop((x, y, x + resolution, y + resolution))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else image


def transform(image: Image.Image, resolution: int, augment: str, rng: np.random.Generator) -> Image.Image:
    """An R x R picture by the listing of `augment`, or the middle square for "none"."""
    if augment == "none":
        return shorter_side(image, resolution)
    if augment not in AUGMENTS:
        raise ValueError(f"unknown augment {augment!r}; expected one of {', '.join(AUGMENTS)}")
    crop = (dvae_crop if augment == "dvae" else transformer_crop)(*image.size, resolution, rng)
    return apply_crop(image, crop, resolution)

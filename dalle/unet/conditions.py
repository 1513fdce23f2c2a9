"""Conditions of training: smaller images for an upsampler, random masks for inpainting.

B batch, H W sides, h side of the smaller image
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

BLUR_SIGMA = 0.6
"""Of the smaller image, by a kernel of 3 x 3 (unCLIP, appendix C)."""
MASKS = ("box", "outside", "side", "strokes", "all")
"""What is erased: a box, all but a box, the image from one side, thick strokes, all of it."""


def smaller(images: Tensor, side: int, blurred: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> (B, 3, h, h): means over areas, blurred in the rows of bool (B,)."""
    small = F.interpolate(images, (side, side), mode="area")
    weight = math.exp(-1 / (2 * BLUR_SIGMA**2))  # of a neighbor; the middle has 1
    kernel = torch.tensor([weight, 1.0, weight]) / (1 + 2 * weight)
    padded = F.pad(small, (1, 1, 1, 1), mode="replicate")
    soft = F.conv2d(padded, torch.outer(kernel, kernel).expand(3, 1, 3, 3), groups=3)
    return torch.where(blurred[:, None, None, None], soft, small)


def random_mask(rng: np.random.Generator, side: int) -> Tensor:
    """float (1, H, W) of an image of this side: 1 where pixels are known, 0 where one of `MASKS` erases."""
    kind, known = MASKS[rng.integers(len(MASKS))], np.ones((side, side), np.float32)
    height, width = rng.integers(side // 4, 3 * side // 4 + 1, size=2)
    if kind == "all":
        known[:] = 0
    elif kind == "side":
        known[:height] = 0
        known = np.rot90(known, rng.integers(4)).copy()
    elif kind == "strokes":
        image = Image.new("L", (side, side), 1)
        points = rng.integers(side, size=(rng.integers(2, 6), 2))
        ImageDraw.Draw(image).line([tuple(p) for p in points.tolist()], fill=0, width=max(1, side // 6))
        known = np.asarray(image, dtype=np.float32)
    else:
        top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
        known[top : top + height, left : left + width] = 0
        known = 1 - known if kind == "outside" else known
    return torch.from_numpy(known.copy())[None]

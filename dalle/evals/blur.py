"""Gaussian blur applied before FID and IS (Section 3.1, Figure 9).

The dVAE's tokens let the transformer leave out fine detail, so the paper measures generated and real images
behind filters of radius 0 to 8. It does not define the radius; here it is the standard deviation in pixels,
as in Pillow. Borders are replicated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 4  # standard deviations; the weights beyond are less than 1e-4


def blur(pixels: Tensor, radius: float) -> Tensor:
    """Pixels (B, C, H, W) filtered by a Gaussian of that standard deviation; unchanged for radius 0."""
    if radius < 0:
        raise ValueError(f"a blur radius cannot be negative, got {radius}")
    if radius == 0:
        return pixels
    reach = int(REACH * radius + 0.5)
    return gaussian_filter(F.pad(pixels, (reach, reach, reach, reach), mode="replicate"), radius, reach)


def gaussian_filter(pixels: Tensor, sigma: float, reach: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H - 2 reach, W - 2 reach): a Gaussian window of 2 reach + 1 pixels, no
    padding."""
    offsets = torch.arange(-reach, reach + 1, dtype=pixels.dtype, device=pixels.device)
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (weights / weights.sum())[None, None, :, None]
    planes = F.conv2d(F.conv2d(pixels.flatten(0, 1)[:, None], kernel), kernel.mT)
    return planes.view(*pixels.shape[:2], *planes.shape[2:])

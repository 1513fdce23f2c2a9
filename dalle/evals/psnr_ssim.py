"""PSNR and SSIM, in float64 on the CPU, and the Gaussian filter of SSIM and of blurred FID.

B images of C channels, H x W pixels
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004, section III.C
K1, K2 = 0.01, 0.03  # as there; pixels span 1
BLUR_REACH = 4  # standard deviations; the weights beyond are less than 1e-4


def psnr(pixels: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pixels (B, C, H, W) in [0, 1]: (B,); inf for equal images."""
    _check(pixels, others)
    return -10 * (pixels.cpu().double() - others.cpu().double()).square().mean((1, 2, 3)).log10()


def ssim(pixels: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of pixels (B, C, H, W) in [0, 1]: (B,), at most 1.

    The mean over channels and over all positions where the Gaussian window of 11 x 11 fits.
    """
    _check(pixels, others)
    if min(pixels.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW} x {WINDOW} pixels or more, got {tuple(pixels.shape[2:])}")
    x, y = pixels.cpu().double(), others.cpu().double()
    mean_x, mean_y, xx, yy, xy = (gaussian_filter(z, SIGMA, WINDOW // 2) for z in (x, y, x * x, y * y, x * y))
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    structure = (2 * cov + K2**2) / (var_x + var_y + K2**2)
    return (luminance * structure).mean((1, 2, 3))


def blur(pixels: Tensor, radius: float) -> Tensor:
    """Pixels (B, C, H, W) filtered by a Gaussian, as before FID and IS in Figure 9; unchanged for radius 0.

    The paper does not define the radius; here it is the standard deviation in pixels. Borders are replicated.
    """
    if radius < 0:
        raise ValueError(f"a blur radius cannot be negative, got {radius}")
    if radius == 0:
        return pixels
    reach = int(BLUR_REACH * radius + 0.5)
    return gaussian_filter(F.pad(pixels, (reach, reach, reach, reach), mode="replicate"), radius, reach)


def gaussian_filter(pixels: Tensor, sigma: float, reach: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H - 2 reach, W - 2 reach): a window of 2 reach + 1 pixels, no padding."""
    offsets = torch.arange(-reach, reach + 1, dtype=pixels.dtype, device=pixels.device)
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (weights / weights.sum())[None, None, :, None]
    planes = F.conv2d(F.conv2d(pixels.flatten(0, 1)[:, None], kernel), kernel.mT)
    return planes.view(*pixels.shape[:2], *planes.shape[2:])


def _check(pixels: Tensor, others: Tensor) -> None:
    if pixels.ndim != 4 or pixels.shape != others.shape:
        raise ValueError(f"expected two equal shapes (B, C, H, W), got {[*pixels.shape]}, {[*others.shape]}")

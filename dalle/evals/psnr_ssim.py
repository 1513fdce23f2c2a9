"""How like two images are, pixel by pixel and window by window.

B images of C channels, H x W pixels
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, DEVIATION = 11, 1.5  # Wang et al. 2004, section III.C
K1, K2 = 0.01, 0.03  # as there; pixels span 1


def psnr(pixels: Tensor, others: Tensor) -> Tensor:
    """Peak signal to noise of each pair in decibels, -10 log10(mean squared error): (B,); inf for equal images.

    Args:
        pixels, others: (B, C, H, W) in [0, 1].
    """
    _check(pixels, others)
    return -10 * (pixels.double() - others.double()).square().mean((1, 2, 3)).log10()


def ssim(pixels: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair, at most 1 (Wang et al. 2004): (B,).

    Means, variances and covariance in a Gaussian window of 11 x 11, wherever it lies wholly within the image; the
    mean over places and channels.

    Args:
        pixels, others: (B, C, H, W) in [0, 1], sides at least 11.
    """
    _check(pixels, others)
    if min(pixels.shape[2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs images of {WINDOW} x {WINDOW} pixels or more, got {tuple(pixels.shape[2:])}"
        )
    x, y = pixels.double(), others.double()
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * DEVIATION**2))
    line = (line / line.sum())[None, None, :, None]

    def window(z: Tensor) -> Tensor:
        z = z.flatten(0, 1)[:, None]  # (B * C, 1, H, W)
        return F.conv2d(F.conv2d(z, line), line.mT).view(
            *x.shape[:2], *(side - WINDOW + 1 for side in x.shape[2:])
        )

    mean_x, mean_y = window(x), window(y)
    var_x, var_y = window(x * x) - mean_x**2, window(y * y) - mean_y**2
    both = window(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    structure = (2 * both + K2**2) / (var_x + var_y + K2**2)
    return (luminance * structure).mean((1, 2, 3))


def _check(pixels: Tensor, others: Tensor) -> None:
    if pixels.ndim != 4 or pixels.shape != others.shape:
        raise ValueError(
            f"expected two times (B, C, H, W), got {tuple(pixels.shape)} and {tuple(others.shape)}"
        )

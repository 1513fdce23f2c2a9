"""PSNR and SSIM.

B images of C channels, H x W pixels
"""

from torch import Tensor

from dalle.evals.blur import gaussian_filter

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004, section III.C
K1, K2 = 0.01, 0.03  # as there; pixels span 1


def psnr(pixels: Tensor, others: Tensor) -> Tensor:
    """Peak signal to noise of each pair in decibels, -10 log10(mean squared error): (B,); inf for equal
    images.

    Args:
        pixels, others: (B, C, H, W) in [0, 1].
    """
    _check(pixels, others)
    return -10 * (pixels.double() - others.double()).square().mean((1, 2, 3)).log10()


def ssim(pixels: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair, at most 1 (Wang et al. 2004): (B,).

    Means, variances and covariance in a Gaussian window of 11 x 11 at every position where it fits; the mean
    over positions and channels.

    Args:
        pixels, others: (B, C, H, W) in [0, 1], sides at least 11.
    """
    _check(pixels, others)
    if min(pixels.shape[2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs images of {WINDOW} x {WINDOW} pixels or more, got {tuple(pixels.shape[2:])}"
        )
    x, y = pixels.double(), others.double()

    def window(z: Tensor) -> Tensor:
        return gaussian_filter(z, SIGMA, WINDOW // 2)

    mean_x, mean_y = window(x), window(y)
    var_x, var_y = window(x * x) - mean_x**2, window(y * y) - mean_y**2
    both = window(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    structure = (2 * both + K2**2) / (var_x + var_y + K2**2)
    return (luminance * structure).mean((1, 2, 3))


def _check(pixels: Tensor, others: Tensor) -> None:
    if pixels.ndim != 4 or pixels.shape != others.shape:
        raise ValueError(
            f"expected two equal shapes (B, C, H, W), got {tuple(pixels.shape)} and {tuple(others.shape)}"
        )

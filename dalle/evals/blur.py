"""Images seen from afar: a Gaussian filter, as the paper applies it before FID and IS (section 3.1, Figure 9).

The dVAE's tokens let the transformer leave out fine detail, so the paper measures drawn and real images both
behind filters of radius 0 to 8. It does not say what a radius is; here it is the Gaussian's standard deviation in
pixels, as in Pillow. Beyond the rim the last pixel goes on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

RADII = (0, 1, 2, 4, 8)  # Figure 9
REACH = 4  # standard deviations; what lies beyond weighs less than 1e-4


def blur(pixels: Tensor, radius: float) -> Tensor:
    """Pixels (B, C, H, W), filtered by a Gaussian of that standard deviation; as they are for radius 0."""
    if radius < 0:
        raise ValueError(f"a blur radius cannot be negative, got {radius}")
    if radius == 0:
        return pixels
    reach = int(REACH * radius + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=pixels.dtype, device=pixels.device)
    line = torch.exp(-offsets.square() / (2 * radius**2))
    line = (line / line.sum())[None, None, :, None]
    planes = F.pad(pixels.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(planes, line), line.mT).view_as(pixels)

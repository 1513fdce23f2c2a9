"""What the dVAE minimizes (paper section 2.1, appendices A.2 and A.3).

Per image: ( -sum over pixel values of ln f(x) + beta * sum over positions of KL ) / pixel values,
with f the logit-Laplace density and KL the exact divergence of the encoder's categorical from the
uniform one, without Gumbel noise. Both parts are divided by the number of pixel values (A.2: 196,608),
so beta acts as beta * positions / pixel values on the mean KL of a position: beta / 192 at paper size.

    B batch, C channels, H W pixels, K vocabulary, h w grid
"""

import math

import torch
from torch import Tensor

from dalle.dvae.model import map_pixels
from dalle.sampling import numbers_by_place


def logit_laplace_log_prob(x: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """Log density of the logit-Laplace distribution on (0, 1), elementwise, in nats (A.3).

    ln f(x | mu, b) = -ln(2 b x (1 - x)) - |logit(x) - mu| / b

    Args:
        x: values in (0, 1).
        mu: location, on the logit scale.
        log_b: ln of the scale.
    """
    log_x, log_1mx = torch.log(x), torch.log1p(-x)
    return -math.log(2) - log_b - log_x - log_1mx - (log_x - log_1mx - mu).abs() * torch.exp(-log_b)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL of softmax(logits) over dim 1 from the uniform distribution, in nats.

    Args:
        logits: (B, K, h, w).

    Returns:
        (B, h, w), ln K - H; 0 for equal logits, ln K for a one-hot.
    """
    log_q = torch.log_softmax(logits.float().movedim(1, -1), dim=-1)  # codes last: faster in channels_last
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(dim=-1)


def gumbel_softmax(logits: Tensor, tau: float, first: int = 0) -> Tensor:
    """A relaxed sample of a one-hot over dim 1 (2.1): softmax((logits + Gumbel noise) / tau), fp32.

    Used forward and backward; no straight-through. The noise of an image follows from torch's seed and its
    place in the batch, of which these logits may be a part that begins at place `first`.
    """
    logits = logits.float().movedim(1, -1)
    uniform = numbers_by_place(logits, first).clamp_min(torch.finfo(torch.float32).tiny)
    gumbel = -(-uniform.log()).log()
    return torch.softmax((logits + gumbel) / tau, dim=-1).movedim(-1, 1)


def reconstruction_loss(pixels: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """Negative log likelihood in nats per pixel value, averaged over B, C, H and W."""
    return -logit_laplace_log_prob(map_pixels(pixels.float()), mu, log_b).mean()


def kl_loss(logits: Tensor, pixel_values: int) -> Tensor:
    """Sum over positions of the KL, averaged over B, in nats per pixel value of an image (A.2).

    Args:
        logits: (B, K, h, w).
        pixel_values: C * H * W of one image.
    """
    return kl_to_uniform(logits).sum(dim=(1, 2)).mean() / pixel_values

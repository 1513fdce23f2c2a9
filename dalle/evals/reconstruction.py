"""Reconstruction quality and codebook usage of an image tokenizer (Sections 2.1 and A.3, Figure 1).

B images of a batch, K codes
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dalle.dvae import DVAE
from dalle.dvae.losses import kl_to_uniform, reconstruction_loss
from dalle.dvae.metrics import codebook_usage
from dalle.evals.psnr_ssim import psnr, ssim
from dalle.evals.running_mean import MeanMetric
from dalle.types import ImageTokenizer


@torch.no_grad()
def run(
    model: ImageTokenizer, batches: Iterable[Tensor], lpips: Callable[[Tensor, Tensor], Tensor] | None = None
) -> dict[str, float]:
    """Means over images of reconstructions by hard codes, and codebook usage over all of them.

    Batches are pixels (B, 3, H, W) in [0, 1] on the model's device; `lpips` gives distances (B,) of two. The
    names are images; psnr in dB, ssim, mae, lpips; codebook_used, codebook_dead_frac, perplexity; of a DVAE
    nats_per_pixel_value (logit-Laplace) and kl in nats per position.
    """
    means, counts = MeanMetric(), torch.zeros(model.vocab_size, dtype=torch.int64)
    for pixels in batches:
        if isinstance(model, DVAE):
            logits = model.codebook_logits(pixels)
            mu, log_b = model.decoder(logits.argmax(1)).float().chunk(2, dim=1)
            nats = [reconstruction_loss(*one) for one in zip(pixels, mu, log_b, strict=True)]
            means.add({"nats_per_pixel_value": torch.stack(nats), "kl": kl_to_uniform(logits).mean((1, 2))})
        tokens = model.encode(pixels)
        counts += torch.bincount(tokens.flatten().cpu(), minlength=model.vocab_size)
        decoded = model.decode(tokens, tuple(side // model.downsample_factor for side in pixels.shape[2:]))
        means.add({"psnr": psnr(pixels, decoded), "ssim": ssim(pixels, decoded)})
        means.add({"mae": (decoded - pixels).abs().mean((1, 2, 3))})
        if lpips is not None:
            means.add({"lpips": lpips(pixels, decoded)})
    usage = {name: value.item() for name, value in codebook_usage(counts).items()}
    return means.values() | usage | {"images": means.counts["psnr"]}

"""How well an image tokenizer keeps images (paper sections 2.1 and A.3; Figure 1).

B images of a batch, K codes
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dalle.dvae import DVAE
from dalle.dvae.losses import kl_to_uniform, reconstruction_loss
from dalle.evals.psnr_ssim import psnr, ssim
from dalle.evals.running_mean import MeanMetric
from dalle.types import ImageTokenizer


@torch.no_grad()
def run(
    model: ImageTokenizer, batches: Iterable[Tensor], lpips: Callable[[Tensor, Tensor], Tensor] | None = None
) -> dict[str, float]:
    """MeanMetric over images, and the codes' use over all of them together.

    Args:
        model: any image tokenizer; a DVAE has likelihoods too.
        batches: pixels (B, 3, H, W) in [0, 1], on the model's device.
        lpips: pixels, others -> distances (B,).

    Returns:
        psnr in decibels, ssim, mae, perhaps lpips, of images through hard codes; codebook_used,
        codebook_dead_frac (a share) and perplexity of the codes' shares; of a DVAE also nats_per_pixel_value (of the
        logit-Laplace, hard codes) and kl in nats a position.
    """
    means, times = MeanMetric(), torch.zeros(model.vocab_size, dtype=torch.int64)
    for pixels in batches:
        means.add(_likelihoods(model, pixels) if isinstance(model, DVAE) else {})
        tokens = model.encode(pixels)
        times += torch.bincount(tokens.flatten().cpu(), minlength=model.vocab_size)
        grid = tuple(side // model.downsample_factor for side in pixels.shape[2:])
        through = model.decode(tokens, grid)
        if through.shape != pixels.shape:
            was, came = (" x ".join(map(str, some.shape[2:])) for some in (pixels, through))
            raise ValueError(
                f"images of {was} come out at {came}: there is nothing to compare pixel by pixel"
            )
        error = (through - pixels).abs().mean((1, 2, 3))
        means.add({"psnr": psnr(pixels, through), "ssim": ssim(pixels, through), "mae": error})
        if lpips is not None:
            means.add({"lpips": lpips(pixels, through)})
    return means.values() | code_use(times)


def _likelihoods(model: DVAE, pixels: Tensor) -> dict[str, Tensor]:
    logits = model.codebook_logits(pixels)
    mu, log_b = model.decoder.look_up(logits.argmax(1)).float().chunk(2, dim=1)
    nats = [reconstruction_loss(*one) for one in zip(pixels, mu, log_b, strict=True)]
    return {"nats_per_pixel_value": torch.stack(nats), "kl": kl_to_uniform(logits).mean((1, 2))}


def code_use(times: Tensor) -> dict[str, float]:
    """How many codes are used, the share never used, and perplexity exp(H), from how often each was: (K,)."""
    if not int(times.sum()):
        raise ValueError("no codes to count; expected one image or more")
    share = times.double() / times.sum()
    used = int((times > 0).sum())
    perplexity = math.exp(float(torch.special.entr(share).sum()))
    return {"codebook_used": used, "codebook_dead_frac": 1 - used / len(times), "perplexity": perplexity}

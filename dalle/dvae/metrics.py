"""Metrics of a dVAE: codebook usage, reconstruction with relaxed and hard codes, codebook collapse."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dalle.dvae.losses import gumbel_softmax, kl_loss, reconstruction_loss
from dalle.dvae.model import DVAE, unmap_pixels
from dalle.io.images import image_grid, to_pil
from dalle.types import FULL_BATCH, BatchShard


def code_usage(tokens: Tensor, vocab_size: int, part: BatchShard = FULL_BATCH) -> dict[str, Tensor]:
    """How the codes are used: how many, perplexity exp(H) of their shares, share never seen.

    Args:
        tokens: int64, any number.
        vocab_size: K.
        part: adds up the tokens of all processes.
    """
    counts = tokens.new_zeros(vocab_size).scatter_add_(0, tokens, torch.ones_like(tokens))  # not bincount,
    return codebook_usage(part.sum(counts))  # which makes the host wait for the largest token


def codebook_usage(counts: Tensor) -> dict[str, Tensor]:
    """Codes in use, perplexity exp(H) and fraction never used, from the count of each code (K,)."""
    frequencies = counts.float() / counts.sum()
    used = (counts > 0).sum()
    return {
        "codebook_used": used,
        "perplexity": torch.special.entr(frequencies).sum().exp(),
        "codebook_dead_frac": 1 - used / len(counts),
    }


@torch.no_grad()
def dvae_scores(model: DVAE, pixels: Tensor, tau: float) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Meters of an evaluation, and the reconstructions by soft and by hard codes.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        tau: temperature of the relaxed sample that makes the soft codes.

    Returns:
        nats per pixel value with soft and with hard (argmax) codes, mean absolute error of the hard
        reconstruction, KL in nats a position, code usage; then pixels by soft and by hard codes.
    """
    logits = model.codebook_logits(pixels)
    tokens = logits.argmax(dim=1)
    hard_codes = F.one_hot(tokens, model.vocab_size).permute(0, 3, 1, 2).float()
    (mu_soft, b_soft), (mu_hard, b_hard) = (
        model.reconstruct(codes) for codes in (gumbel_softmax(logits, tau), hard_codes)
    )
    soft, hard = unmap_pixels(mu_soft.sigmoid()), unmap_pixels(mu_hard.sigmoid())
    scores = {
        "recon_loss": reconstruction_loss(pixels, mu_soft, b_soft),
        "recon_loss_hard": reconstruction_loss(pixels, mu_hard, b_hard),
        "mae": (hard - pixels).abs().mean(),
        "kl": kl_loss(logits, 1) / tokens[0].numel(),
        **code_usage(tokens.flatten(), model.vocab_size),
    }
    return scores, soft, hard


def collapse_warning(scores: dict[str, Any], vocab_size: int) -> str | None:
    """A sentence with a remedy when the encoder has stopped using its codes, else None."""
    perplexity = float(scores["perplexity"])
    if perplexity >= max(2.0, 0.01 * vocab_size):
        return None
    return (
        f"collapsed codebook: perplexity {perplexity:.1f} of {vocab_size} codes. Codes die while beta "
        "is small or before the decoder has learned: raise loss.beta.initial, raise model.logit-init-scale, "
        "set model.codebook-init-std 1, lower the learning rate, or vary the backgrounds; start again"
    )


def evaluate_dvae(model: DVAE, pixels: Tensor, tau: float) -> dict[str, Any]:
    """Metrics of held-out images; "reconstructions" shows original, soft and hard reconstruction."""
    parts = [dvae_scores(model, part, tau) for part in pixels.split(64)]
    scores = {
        name: float(torch.stack([part[0][name].float() for part in parts]).mean()) for name in parts[0][0]
    }
    if sentence := collapse_warning(scores, model.vocab_size):
        tqdm.write(f"warning: {sentence}")
    rows = zip(*(to_pil(images[:8]) for images in (pixels, parts[0][1], parts[0][2])), strict=True)
    return scores | {
        "reconstructions": image_grid([list(row) for row in rows], scale=max(1, 128 // pixels.shape[-1]))
    }

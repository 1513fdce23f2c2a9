"""What each stage minimises: schedules and the family's losses joined into one `Loss`.

The training loop calls objective(model, batch, step) and knows nothing else.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.clip import CLIP
from dalle.dvae import DVAE
from dalle.dvae.losses import gumbel_softmax, kl_loss, reconstruction_loss
from dalle.train.schedules import Schedule
from dalle.transformer import Transformer
from dalle.transformer.losses import TEXT_WEIGHT, cross_entropies, weighted_cross_entropy
from dalle.types import WHOLE, Loss, Part, check_pixels


@dataclass(frozen=True)
class DVAEObjective:
    """The relaxed evidence lower bound (2.1, A.2); schedules as published."""

    tau: Schedule = Schedule(1.0, 1 / 16, 150_000)
    """Temperature of the relaxation (A.2)."""
    beta: Schedule = Schedule(0.0, 6.6, 5_000)
    """Weight of the KL (A.2)."""

    def __post_init__(self):
        if min(self.tau.start, self.tau.end) <= 0:
            raise ValueError(f"tau must stay above 0, got {self.tau}")

    def __call__(self, model: DVAE, batch: Tensor, step: int, part: Part = WHOLE) -> Loss:
        """batch: pixels (B, 3, H, W) in [0, 1]. The use of the codes is that of all processes together."""
        check_pixels(batch, model.downsampling)
        tau, beta = self.tau(step), self.beta(step)
        logits = model.codebook_logits(batch)
        mu, log_b = model.reconstruct(gumbel_softmax(logits, tau, part.index * len(batch)))
        soft = reconstruction_loss(batch, mu, log_b)
        kl = kl_loss(logits, batch[0].numel())
        usage = code_usage(logits.detach().argmax(dim=1).flatten(), model.vocab_size, part)
        positions = logits[0, 0].numel()
        metrics = {
            "reconstruction_soft": soft.detach(),
            "kl": kl.detach() * batch[0].numel() / positions,  # nats a position
            "tau": tau,
            "beta": beta,
            **usage,
        }
        return Loss(soft + beta * kl, metrics)


def code_usage(tokens: Tensor, vocab_size: int, part: Part = WHOLE) -> dict[str, Tensor]:
    """How the codes are used: how many, perplexity exp(H) of their shares, share never seen.

    Args:
        tokens: int64, any number.
        vocab_size: K.
        part: adds up the tokens of all processes.
    """
    times = part.sum(torch.bincount(tokens, minlength=vocab_size)).float()
    share = times / times.sum()
    used = (share > 0).sum()
    return {
        "codes_used": used,
        "perplexity": torch.special.entr(share).sum().exp(),
        "dead_codes": 1 - used / vocab_size,
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
    soft, hard = model.to_pixels(mu_soft), model.to_pixels(mu_hard)
    scores = {
        "reconstruction_soft": reconstruction_loss(pixels, mu_soft, b_soft),
        "reconstruction_hard": reconstruction_loss(pixels, mu_hard, b_hard),
        "absolute_error": (hard - pixels).abs().mean(),
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
        f"the codebook has collapsed: perplexity {perplexity:.1f} of {vocab_size} codes. Codes die while beta is small "
        "or before the decoder has learned: raise objective.beta.start, raise model.logit-gain and set "
        "model.code-std 1, lower the step size, or vary the pictures' grounds; then start again"
    )


@dataclass(frozen=True)
class TransformerObjective:
    """Weighted cross-entropies of text and image tokens (2.2, B.2)."""

    text_weight: float = TEXT_WEIGHT
    """Weight of the text; the image has the rest (2.2)."""

    def __post_init__(self):
        if not 0 <= self.text_weight <= 1:
            raise ValueError(f"text_weight must lie in [0, 1], got {self.text_weight}")

    def counts(self, model: Transformer, batch: Tensor) -> Tensor:
        """Text tokens in joint ids (B, N); every picture has as many image tokens."""
        return model.layout.loss_mask(batch)[:, : model.layout.text_len].sum()

    def __call__(self, model: Transformer, batch: Tensor, step: int, part: Part = WHOLE) -> Loss:
        """batch: joint ids (B, N)."""
        share = None if part.counts is None else part.counts / part.count  # so that the parts' mean is the batch's
        text, image = cross_entropies(model, batch, text_tokens=share)
        total = weighted_cross_entropy(text, image, self.text_weight)
        return Loss(total, {"text_nats": text.detach(), "image_nats": image.detach()})


@dataclass(frozen=True)
class CLIPObjective:
    """Symmetric cross-entropy over the scaled cosines of a batch (Radford et al., Figure 3).

    A batch may also hold pictures that no caption describes, one beside each pair: then each caption must
    prefer its picture to all of these too. Every caption meets the pictures of all processes, and so for the pictures.
    """

    def __call__(self, model: CLIP, batch: tuple[Tensor, ...], step: int, part: Part = WHOLE) -> Loss:
        """batch: pixels (B, 3, H, W) in [0, 1], packed text (B, L), perhaps other pictures (B, 3, H, W)."""
        pixels, packed, *others = batch
        text = model.encode_text(packed).float()
        images, *spoilt = model.encode_image(torch.cat([pixels, *others])).float().split(len(pixels))
        all_text, all_images = part.gather(text), part.gather(images)  # (processes * B, E)
        scale, own = model.logit_scale(), part.index * len(pixels) + torch.arange(len(pixels), device=pixels.device)
        to_text, to_images = scale * images @ all_text.T, scale * text @ all_images.T
        total = (F.cross_entropy(to_text, own) + F.cross_entropy(to_images, own)) / 2
        right = (to_text.argmax(dim=1) == own).float().mean()
        metrics = {"picture_to_caption": right, "logit_scale": scale.detach()}
        if spoilt:  # a caption's own picture stands at its number among all pictures, whole and broken
            to_spoilt = scale * text @ part.gather(spoilt[0]).T
            total = total + F.cross_entropy(torch.cat([to_images, to_spoilt], dim=1), own)
            metrics["whole_over_broken"] = ((images - spoilt[0]) * text).sum(dim=1).gt(0).float().mean()
        return Loss(total, metrics)

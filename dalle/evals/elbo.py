"""Bits per dimension: both stages in one number, by the evidence lower bound (paper section 2, Eq. 1).

For an image x, a caption y and image tokens z, with beta = 1 (a larger one gives no bound) and any
distribution q(z):

    ln p(x, y)  >=  E_q[ ln p(x | z) ]  +  E_q[ ln p(z | y) ]  +  ln p(y)  +  H(q)

    p(x | z)    the dVAE's decoder: a logit-Laplace for each value of a pixel
    p(z | y)    the transformer's image tokens after the caption
    p(y)        the transformer's text tokens: one way of many to write y as tokens, so again a lower bound
    q(z)        the dVAE's encoder. Strictly it is its softmax, from which z is sampled, and H(q) is the sum
    of its
                positions' entropies: "sampled". Stage two learns the argmax instead (footnote 6), which is a
                q of its own that is certain of one z, so H(q) = 0: "argmax". Both are bounds; the better one
                says more.

The paper's likelihood is a density on (0, 1) and not the probability of an 8-bit value. Here a value v has
the mass of the logit-Laplace over phi((v - 1/2) / 255) .. phi((v + 1/2) / 255), and the first and last value
also what lies beyond them; so the 256 probabilities add up to 1 and bits per dimension compare with other
models of 8-bit images. Bits per dimension of x, y are -ln p / ln 2 over the number of pixel values (3 H W);
those of x alone, given y, leave ln p(y) out.

    B pairs of a batch, K codes, h w grid
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dalle.dvae import DVAE
from dalle.dvae.model import EPSILON
from dalle.evals.running_mean import MeanMetric
from dalle.transformer import Transformer
from dalle.transformer.losses import log_likelihood

LEVELS = 255


@torch.no_grad()
def run(
    dvae: DVAE, transformer: Transformer, batches: Iterable[tuple[Tensor, Tensor]], seed: int = 0
) -> dict[str, dict[str, float]]:
    """The bound and its parts, means over pairs, for both choices of q.

    Args:
        dvae: the image tokenizer; one without a likelihood has no bound.
        transformer: trained on its tokens.
        batches: pixels (B, 3, H, W) in [0, 1] of 8-bit images and text_tokens (B, T), on the models' device.
        seed: of the sampled tokens.

    Returns:
        "argmax" and "sampled", each with image_nats (-ln p(x | z)), image_token_nats, text_nats,
        entropy_nats, all per pair; bits_per_dim of image and caption; bits_per_dim_given_caption.
    """
    if not isinstance(dvae, DVAE):
        raise ValueError(
            f"the bound needs a decoder with a likelihood, a DVAE; {type(dvae).__name__} has none"
        )
    rng = torch.Generator().manual_seed(seed)
    means, values = {"argmax": MeanMetric(), "sampled": MeanMetric()}, 0
    for pixels, text_tokens in batches:
        values = pixels[0].numel()
        log_q = dvae.codebook_logits(pixels).double().log_softmax(1).flatten(2).mT.cpu()  # (B, h * w, K)
        drawn = torch.multinomial(log_q.exp().flatten(0, 1), 1, generator=rng).view(log_q.shape[:2])
        entropy = torch.special.entr(log_q.exp()).sum((1, 2))
        for name, tokens, h in (("argmax", log_q.argmax(2), 0 * entropy), ("sampled", drawn, entropy)):
            means[name].add(
                _parts(dvae, transformer, pixels, text_tokens, tokens.to(pixels.device)) | {"entropy": h}
            )
    return {name: _joined(one.values(), values) for name, one in means.items()}


def _parts(dvae: DVAE, transformer: Transformer, pixels: Tensor, text_tokens: Tensor, tokens: Tensor):
    """-ln p(x | z), -ln p(z | y), -ln p(y) of each pair."""
    grid = tuple(side // dvae.downsample_factor for side in pixels.shape[2:])
    mu, log_b = dvae.decoder(tokens.view(-1, *grid)).double().chunk(2, dim=1)
    image = -log_mass(pixels, mu, log_b).sum((1, 2, 3))
    text, image_tokens = log_likelihood(transformer, transformer.layout.pack(text_tokens, tokens))
    return {"image": image, "image_token": -image_tokens, "text": -text}


def _joined(means: dict[str, float], values: int) -> dict[str, float]:
    given = means["image"] + means["image_token"] - means["entropy"]
    return {f"{name}_nats": value for name, value in means.items()} | {
        "bits_per_dim": (given + means["text"]) / (values * math.log(2)),
        "bits_per_dim_given_caption": given / (values * math.log(2)),
    }


def log_mass(pixels: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """Log probability of 8-bit values under the logit-Laplace, elementwise, in nats.

    Args:
        pixels: in [0, 1], rounded here to multiples of 1/255.
        mu: location, on the logit scale.
        log_b: ln of the scale.
    """
    level = (pixels.double() * LEVELS).round()
    low, high = (
        torch.logit(EPSILON + (1 - 2 * EPSILON) * (level + step) / LEVELS) for step in (-0.5, 0.5)
    )  # edges of the value's bin
    low = low.masked_fill(level == 0, -torch.inf)
    high = high.masked_fill(level == LEVELS, torch.inf)
    a, c = (
        (edge - mu.double()) * torch.exp(-log_b.double()) for edge in (low, high)
    )  # standard Laplace, a < c
    # A Laplace is even: turn what lies right of its middle to the left, where its distribution is exp(c) / 2.
    a, c = torch.where(a > 0, -c, a), torch.where(a > 0, -a, c)
    beside = c + torch.log(-torch.expm1(a - c)) - math.log(2)
    across = torch.log1p(-(torch.exp(a.clamp(max=0)) + torch.exp(-c.clamp(min=0))) / 2)
    return torch.where(c <= 0, beside, across)

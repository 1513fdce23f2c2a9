"""Log-likelihoods: of the transformer in nats per token, of both stages in bits per dimension (Eq. 1).

For an image x, a caption y and image tokens z, with beta = 1 and any distribution q(z):

    ln p(x, y)  >=  E_q[ ln p(x | z) ]  +  E_q[ ln p(z | y) ]  +  ln p(y)  +  H(q)

    p(x | z)    the dVAE's decoder: a logit-Laplace for each value of a pixel
    p(z | y)    the transformer's image tokens after the caption
    p(y)        the transformer's text tokens; a caption has other spellings as tokens, so again a lower bound
    q(z)        the dVAE's encoder: "sampled" from its softmax, or its "argmax", which stage two learns
                (footnote 6) and whose entropy H(q) is 0; both are bounds

The paper's likelihood is a density on (0, 1). Here an 8-bit value v has the mass of the logit-Laplace over
phi((v - 1/2) / 255) .. phi((v + 1/2) / 255), the first and last value also all beyond, as in other models of
8-bit images. Bits per dimension are -ln p / ln 2 over the 3 H W pixel values.

    B pairs of a batch, K codes, h w grid, T text positions, N positions
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dalle.dvae import DVAE
from dalle.dvae.model import EPSILON
from dalle.evals.running_mean import MeanMetric
from dalle.precision import tf32
from dalle.transformer import Transformer
from dalle.transformer.losses import TEXT_WEIGHT, log_likelihood, weighted_cross_entropy

LEVELS = 255


@torch.no_grad()
def nats_per_token(model: Transformer, batches: Iterable[Tensor]) -> dict[str, float]:
    """text_loss, image_loss and loss (both weighted as in training) in nats per token, and numbers of tokens.

    Batches are joint ids (B, N) on the model's device. A caption's end counts as a token; long captions
    weigh more than short ones.
    """
    nats, tokens, pairs = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), 0
    for ids in batches:
        pairs += len(ids)
        counts = model.layout.loss_mask(ids).split([model.layout.text_len, model.layout.num_image_tokens], 1)
        tokens += torch.stack([one.sum().cpu() for one in counts])
        nats -= torch.stack([one.cpu().double().sum() for one in log_likelihood(model, ids)])
    if not pairs:
        raise ValueError("no pairs to measure; expected one or more")
    (text, image), (text_tokens, image_tokens) = (nats / tokens).tolist(), tokens.tolist()
    losses = {"text_loss": text, "image_loss": image}
    losses["loss"] = weighted_cross_entropy(text, image, TEXT_WEIGHT)
    return losses | {"text_tokens": text_tokens, "image_tokens": image_tokens, "pairs": pairs}


@torch.no_grad()
@tf32(False)
def bits_per_dim(
    dvae: DVAE, transformer: Transformer, batches: Iterable[tuple[Tensor, Tensor]], seed: int = 0
) -> dict[str, dict[str, float]]:
    """The bound and its parts, means over pairs, for both choices of q.

    Batches are pixels (B, 3, H, W) in [0, 1] of 8-bit images and text_tokens (B, T), on the models' device.
    "argmax" and "sampled" each have image_nats (-ln p(x | z)), image_token_nats, text_nats, entropy_nats per
    pair; bits_per_dim of image and caption; bits_per_dim_given_caption.
    """
    rng = torch.Generator().manual_seed(seed)
    means, dims = {"argmax": MeanMetric(), "sampled": MeanMetric()}, 0
    for pixels, text_tokens in batches:
        dims = pixels[0].numel()
        log_q = dvae.codebook_logits(pixels).cpu().double().log_softmax(1).flatten(2).mT  # (B, h * w, K)
        sampled = torch.multinomial(log_q.exp().flatten(0, 1), 1, generator=rng).view(log_q.shape[:2])
        entropy = torch.special.entr(log_q.exp()).sum((1, 2))
        for name, ids, h in (("argmax", log_q.argmax(2), 0 * entropy), ("sampled", sampled, entropy)):
            tokens = ids.to(pixels.device)
            grid = tuple(side // dvae.downsample_factor for side in pixels.shape[2:])
            mu, log_b = dvae.decoder(tokens.view(-1, *grid)).chunk(2, dim=1)
            text, image_tokens = log_likelihood(transformer, transformer.layout.pack(text_tokens, tokens))
            image = log_mass(pixels, mu, log_b).sum((1, 2, 3))
            means[name].add({"image_nats": -image, "image_token_nats": -image_tokens})
            means[name].add({"text_nats": -text, "entropy_nats": h})
    report = {name: mean.values() for name, mean in means.items()}
    for nats in report.values():
        given_caption = nats["image_nats"] + nats["image_token_nats"] - nats["entropy_nats"]
        nats["bits_per_dim"] = (given_caption + nats["text_nats"]) / (dims * math.log(2))
        nats["bits_per_dim_given_caption"] = given_caption / (dims * math.log(2))
    return report


def log_mass(pixels: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """Log probability of 8-bit values under the logit-Laplace of mu and ln b, elementwise, in nats.

    In float64 on the CPU: other devices lack it.
    """
    pixels, mu, log_b = (values.cpu().double() for values in (pixels, mu, log_b))
    level = (pixels * LEVELS).round()
    edges = [EPSILON + (1 - 2 * EPSILON) * (level + step) / LEVELS for step in (-0.5, 0.5)]
    low = torch.logit(edges[0]).masked_fill(level == 0, -torch.inf)
    high = torch.logit(edges[1]).masked_fill(level == LEVELS, torch.inf)
    a, c = ((edge - mu) * torch.exp(-log_b) for edge in (low, high))  # a < c
    # A Laplace is even: a bin right of the middle is mirrored to the left, where it is exp(c) / 2.
    a, c = torch.where(a > 0, -c, a), torch.where(a > 0, -a, c)
    one_side = c + torch.log(-torch.expm1(a - c)) - math.log(2)
    across = torch.log1p(-(torch.exp(a.clamp(max=0)) + torch.exp(-c.clamp(min=0))) / 2)
    return torch.where(c <= 0, one_side, across)

"""Log-likelihood of the transformer on validation pairs, in nats per token (Section 2.2).

B pairs of a batch
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dalle.transformer import Transformer
from dalle.transformer.losses import TEXT_WEIGHT, log_likelihood, weighted_cross_entropy


@torch.no_grad()
def run(model: Transformer, batches: Iterable[Tensor]) -> dict[str, float]:
    """Nats per token: all nats over all tokens, so that a long caption weighs more than a short one.

    Args:
        model: the transformer.
        batches: joint ids (B, N), on the model's device.

    Returns:
        text_loss, image_loss (per token; a caption's end counts as one), loss (both weighted as in training),
        and the numbers of tokens and pairs.
    """
    nats, tokens, pairs = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), 0
    for ids in batches:
        pairs += len(ids)
        counts = model.layout.loss_mask(ids)
        text = int(counts[:, : model.layout.text_len].sum())
        tokens += torch.tensor([text, int(counts.sum()) - text])
        nats -= torch.stack([one.double().sum().cpu() for one in log_likelihood(model, ids)])
    if not int(tokens.sum()):
        raise ValueError("no pairs to measure; expected one or more")
    text, image = (nats / tokens).tolist()
    total = weighted_cross_entropy(text, image, TEXT_WEIGHT)
    text_tokens, image_tokens = tokens.tolist()
    losses = {"text_loss": text, "image_loss": image, "loss": total}
    return losses | {"text_tokens": text_tokens, "image_tokens": image_tokens, "pairs": pairs}

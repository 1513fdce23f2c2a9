"""How well the transformer predicts captions and images it never saw (paper section 2.2).

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
        text_loss, image_loss (per token; a caption's end counts as one), loss (both weighted as in training), and
        the tokens that were counted.
    """
    nats, tokens = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for ids in batches:
        counts = model.layout.loss_mask(ids)
        text = int(counts[:, : model.layout.text_len].sum())
        tokens += torch.tensor([text, int(counts.sum()) - text])
        nats -= torch.stack([one.double().sum().cpu() for one in log_likelihood(model, ids)])
    if not int(tokens.sum()):
        raise ValueError("no pairs to measure; expected one or more")
    text, image = (nats / tokens).tolist()
    total = weighted_cross_entropy(text, image, TEXT_WEIGHT)
    return {"text_loss": text, "image_loss": image, "loss": total} | dict(
        zip(("text_tokens", "image_tokens"), tokens.tolist(), strict=True)
    )

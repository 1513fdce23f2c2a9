"""Losses of the transformer: chunked cross-entropies of text and image tokens (2.2, B.2).

The cross-entropies of text and of image tokens are each divided by the number of such tokens in the
batch, then weighted 1/8 and 7/8. Each modality has a softmax over its own vocabulary, and logits exist
for a chunk of positions at a time: at paper size those of a batch would outweigh the model.

    B batch, T text_len, N all positions, R positions, D width
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dalle.transformer.config import TEXT_WEIGHT
from dalle.transformer.model import Transformer

LOGITS = 2**23  # at once, 32 MiB: 1,024 positions over the paper's 8,192 codes


def cross_entropies(
    model: Transformer, ids: Tensor, logits: int = LOGITS, text_tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean negative log likelihood in nats per text token and per image token.

    Args:
        ids: joint ids (B, N).
        logits: how many exist at once (at least one position's).
        text_tokens: what the text's sum is divided by; by default the number of text tokens in `ids`.
    """
    layout = model.layout
    at_once = [max(1, logits // vocab) for vocab in (layout.image_offset, layout.image_vocab)]
    hidden = model.hidden(ids)
    text, image = layout.unpack(ids)
    counts = layout.loss_mask(ids)[:, : layout.text_len]
    positions = torch.arange(layout.text_len, device=ids.device).expand_as(counts)[counts]
    states = hidden[:, : layout.text_len][counts], hidden[:, layout.text_len :].flatten(0, 1)
    return (
        chunked_cross_entropy(
            model.text_logits, (states[0], positions), text[counts], at_once[0], text_tokens
        ),
        chunked_cross_entropy(model.image_logits, (states[1],), image.flatten(), at_once[1]),
    )


def chunked_cross_entropy(
    to_logits: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    targets: Tensor,
    chunk: int,
    count: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of R positions, made `chunk` at a time and again in the backward pass.

    Args:
        to_logits: inputs of some positions -> logits (positions, vocabulary).
        inputs: what it takes, each (R, ...).
        targets: int64 (R,).
        chunk: positions at once; all R in one go are not computed twice.
        count: what the sum is divided by; by default R.
    """
    count = len(targets) if count is None else count

    def nats(targets: Tensor, *inputs: Tensor) -> Tensor:
        return F.cross_entropy(to_logits(*inputs), targets, reduction="sum")

    if len(targets) <= chunk:
        return nats(targets, *inputs) / count
    parts = zip(targets.split(chunk), *(i.split(chunk) for i in inputs), strict=True)
    return sum(checkpoint(nats, *part, use_reentrant=False) for part in parts) / count


@torch.no_grad()
def log_likelihood(model: Transformer, ids: Tensor, logits: int = LOGITS) -> tuple[Tensor, Tensor]:
    """Log likelihood of each sequence's caption and of its image tokens after it, in nats.

    Args:
        ids: joint ids (B, N).
        logits: how many exist at once (at least one position's).

    Returns:
        text (B,): sum over the caption's tokens and the pad that ends it; image (B,): sum over image tokens.
    """
    layout, hidden = model.layout, model.hidden(ids)
    text, image = layout.unpack(ids)
    counts = layout.loss_mask(ids)[:, : layout.text_len]
    at_once = [max(1, logits // (vocab * len(ids))) for vocab in (layout.image_offset, layout.image_vocab)]
    of_text = _log_probabilities(model.text_logits, hidden[:, : layout.text_len], text, at_once[0])
    of_image = _log_probabilities(
        lambda states, positions: model.image_logits(states), hidden[:, layout.text_len :], image, at_once[1]
    )
    return (of_text * counts).sum(dim=1), of_image.sum(dim=1)


def _log_probabilities(
    to_logits: Callable[..., Tensor], states: Tensor, targets: Tensor, chunk: int
) -> Tensor:
    """States (B, n, D) and targets (B, n) -> nats (B, n), `chunk` positions at a time."""
    positions = torch.arange(states.shape[1], device=states.device)
    parts = zip(states.split(chunk, 1), positions.split(chunk), targets.split(chunk, 1), strict=True)
    nats = [
        -F.cross_entropy(to_logits(some, at).flatten(0, 1), goal.flatten(), reduction="none").view(goal.shape)
        for some, at, goal in parts
    ]
    return torch.cat(nats, dim=1)


def weighted_cross_entropy(text: Tensor, image: Tensor, text_weight: float = TEXT_WEIGHT) -> Tensor:
    """The two means joined: text_weight * text + (1 - text_weight) * image."""
    return text_weight * text + (1 - text_weight) * image

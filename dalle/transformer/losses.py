"""What the transformer minimises (paper section 2.2, appendix B.2).

The cross-entropies of text and of image tokens are each divided by the number of such tokens in the
batch, then weighted 1/8 and 7/8. Each modality has a softmax over its own vocabulary.

    B batch, T text_len, N all slots
"""

import torch.nn.functional as F
from torch import Tensor

from dalle.transformer.model import Transformer

TEXT_WEIGHT = 1 / 8  # 2.2


def cross_entropies(model: Transformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log likelihood in nats per text token and per image token.

    Args:
        ids: joint ids (B, N).
    """
    layout = model.layout
    hidden = model.hidden(ids)
    counts = layout.loss_mask(ids)[:, : layout.text_len]
    text_logits = model.text_logits(hidden[:, : layout.text_len])[counts]
    image_logits = model.image_logits(hidden[:, layout.text_len :])
    text, image = layout.unpack(ids)
    return F.cross_entropy(text_logits, text[counts]), F.cross_entropy(image_logits.flatten(0, 1), image.flatten())


def weighted_cross_entropy(text: Tensor, image: Tensor, text_weight: float = TEXT_WEIGHT) -> Tensor:
    """The two means joined: text_weight * text + (1 - text_weight) * image."""
    return text_weight * text + (1 - text_weight) * image

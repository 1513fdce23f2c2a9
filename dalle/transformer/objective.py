"""Training objective of the transformer: weighted cross-entropy of text and image tokens (2.2, B.2)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.masks import dense_mask
from dalle.transformer.config import TransformerConfig, TransformerLossConfig
from dalle.transformer.losses import cross_entropies, weighted_cross_entropy
from dalle.transformer.model import Transformer
from dalle.types import FULL_BATCH, BatchShard, Loss, StepCost


@dataclass(frozen=True)
class TransformerObjective:
    """Weighted cross-entropies of text and image tokens (2.2, B.2)."""

    config: TransformerLossConfig = TransformerLossConfig()

    def num_targets(self, model: Transformer, batch: Tensor) -> Tensor:
        """Text tokens in joint ids (B, N); every image has as many image tokens."""
        return model.layout.loss_mask(batch)[:, : model.layout.text_len].sum()

    def __call__(self, model: Transformer, batch: Tensor, step: int, part: BatchShard = FULL_BATCH) -> Loss:
        """batch: joint ids (B, N), as `TokenLayout.pack` made and checked them."""
        share = (
            None if part.num_targets is None else part.num_targets / part.count
        )  # so that the parts' mean is the batch's
        weight = self.config.z_weight
        text, image = cross_entropies(model, batch, text_tokens=share, check=False, z_weight=weight)
        total = weighted_cross_entropy(text, image, self.config.text_weight)
        if not weight:
            return Loss(total, {"text_loss": text.detach(), "image_loss": image.detach()})
        nats = {"text_loss": text[0] - weight * text[1], "image_loss": image[0] - weight * image[1]}
        metrics = {name: value.detach() for name, value in nats.items()}
        return Loss(total[0], metrics | {"z_loss": (weight * total[1]).detach()})

    def step_cost(self, model: Transformer, batch: Tensor) -> StepCost:
        """By formula."""
        return StepCost(len(batch), batch.numel(), len(batch) * sum(training_flops(model.config).values()))

    def random_baseline(self, model: Transformer) -> dict[str, float]:
        """ln(vocabulary): nats a token of one who guesses evenly. A text position may also hold its pad."""
        layout = model.layout
        text, image = math.log(layout.text_vocab + 1), math.log(layout.image_vocab)
        weight, z_weight = self.config.text_weight, self.config.z_weight
        total = weight * text + (1 - weight) * image
        baseline = {"loss": total, "text_loss": text, "image_loss": image}
        if z_weight:  # all logits 0
            baseline["z_loss"] = z_weight * (weight * text**2 + (1 - weight) * image**2)
            baseline["loss"] += baseline["z_loss"]
        return baseline


def training_flops(config: TransformerConfig) -> dict[str, int]:
    """Floating-point operations of forward and backward over one sequence, 2 a multiplication with addition.

    Only what must be computed: attention counts the pairs that the masks show, logits each position's own
    vocabulary, and nothing is counted twice for being computed again in the backward pass.

    Returns:
        matrices: 6 * 12 D^2 a token and layer; attention: 12 D a visible pair and layer; logits.
    """
    layout, width = config.layout, config.width
    with torch.device("cpu"):
        pairs = {kind: int(dense_mask(kind, layout, config.conv_kernel).sum()) for kind in set(config.kinds)}
    vocabulary = layout.text_len * layout.image_offset + layout.num_image_tokens * layout.image_vocab
    return {
        "matrices": 72 * width**2 * layout.seq_len * config.depth,
        "attention": 12 * width * sum(pairs[kind] for kind in config.kinds),
        "logits": 6 * width * vocabulary,
    }

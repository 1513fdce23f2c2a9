"""Training objective of the transformer: weighted cross-entropy of text and image tokens (2.2, B.2)."""

import math
from dataclasses import dataclass

from torch import Tensor

from dalle.transformer.config import TransformerLossConfig
from dalle.transformer.losses import cross_entropies, weighted_cross_entropy
from dalle.transformer.model import Transformer
from dalle.transformer.sizes import training_flops
from dalle.types import FULL_BATCH, BatchShard, Loss, StepCost


@dataclass(frozen=True)
class TransformerObjective:
    """Weighted cross-entropies of text and image tokens (2.2, B.2)."""

    config: TransformerLossConfig = TransformerLossConfig()

    def num_targets(self, model: Transformer, batch: Tensor) -> Tensor:
        """Text tokens in joint ids (B, N); every image has as many image tokens."""
        return model.layout.loss_mask(batch)[:, : model.layout.text_len].sum()

    def __call__(self, model: Transformer, batch: Tensor, step: int, part: BatchShard = FULL_BATCH) -> Loss:
        """batch: joint ids (B, N)."""
        share = (
            None if part.num_targets is None else part.num_targets / part.count
        )  # so that the parts' mean is the batch's
        text, image = cross_entropies(model, batch, text_tokens=share)
        total = weighted_cross_entropy(text, image, self.config.text_weight)
        return Loss(total, {"text_loss": text.detach(), "image_loss": image.detach()})

    def step_cost(self, model: Transformer, batch: Tensor) -> StepCost:
        """By formula (dalle/transformer/sizes.py)."""
        return StepCost(len(batch), batch.numel(), len(batch) * sum(training_flops(model.config).values()))

    def random_baseline(self, model: Transformer) -> dict[str, float]:
        """ln(vocabulary): nats a token of one who guesses evenly. A text position may also hold its pad."""
        layout = model.layout
        text, image = math.log(layout.text_vocab + 1), math.log(layout.image_vocab)
        total = self.config.text_weight * text + (1 - self.config.text_weight) * image
        return {"loss": total, "text_loss": text, "image_loss": image}

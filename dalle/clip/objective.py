"""Training objective of CLIP: the symmetric contrastive loss (Radford et al. 2021, Figure 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.clip.model import CLIP
from dalle.precision import cosines, full_precision
from dalle.types import FULL_BATCH, BatchShard, Loss, StepCost


class CLIPObjective:
    """Symmetric cross-entropy over the scaled cosines of a batch, of all processes together.

    A batch may also hold hard negatives, an image without a caption beside each pair: then each caption must
    prefer its image to all of these too.
    """

    def __call__(
        self, model: CLIP, batch: tuple[Tensor, ...], step: int, part: BatchShard = FULL_BATCH
    ) -> Loss:
        """batch: pixels (B, 3, H, W) in [0, 1], packed text (B, L), perhaps hard negatives (B, 3, H, W).

        The values of pixels are checked where batches are made (dalle/runs/batches.py).
        """
        pixels, packed, *negatives = batch
        text = model.encode_text(packed)
        images, *negatives = model.image_vectors(torch.cat([pixels, *negatives])).split(len(pixels))
        with full_precision(pixels.device):
            return self._loss(model.logit_scale(), text, images, negatives, part)

    def _loss(
        self, scale: Tensor, text: Tensor, images: Tensor, negatives: Sequence[Tensor], part: BatchShard
    ) -> Loss:
        all_text, all_images = part.gather(text), part.gather(images)  # (processes * B, E)
        if len(all_text) != part.count * len(text):
            raise ValueError(
                "CLIP compares every caption with every image of the batch, which passes over parts cannot; "
                "set grad_accum_steps to 1, and lower batch_size or start more processes to save memory"
            )
        own = part.index * len(text) + torch.arange(len(text), device=text.device)
        to_text, to_images = cosines(scale * images, all_text), cosines(scale * text, all_images)
        total = (F.cross_entropy(to_text, own) + F.cross_entropy(to_images, own)) / 2
        right = (to_text.argmax(dim=1) == own).float().mean()
        metrics = {"image_to_text_acc": right, "logit_scale": scale.detach()}
        if negatives:
            to_negatives = cosines(scale * text, part.gather(negatives[0]))
            total = total + F.cross_entropy(torch.cat([to_images, to_negatives], dim=1), own)
            metrics["hard_negative_acc"] = ((images - negatives[0]) * text).sum(dim=1).gt(0).float().mean()
        return Loss(total, metrics)

    def step_cost(self, model: CLIP, batch: tuple[Tensor, ...]) -> StepCost:
        """Pairs only: open_clip's towers have no formula here."""
        return StepCost(len(batch[0]))

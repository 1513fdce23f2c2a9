"""Training objective of CLIP: the symmetric contrastive loss (Radford et al. 2021, Figure 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.clip.model import CLIP
from dalle.types import FULL_BATCH, BatchShard, Loss, StepCost


class CLIPObjective:
    """Symmetric cross-entropy over the scaled cosines of a batch, of all processes together.

    A batch may also hold hard negatives, an image without a caption beside each pair: then each caption must
    prefer its image to all of these too.
    """

    def __call__(
        self, model: CLIP, batch: tuple[Tensor, ...], step: int, part: BatchShard = FULL_BATCH
    ) -> Loss:
        """batch: pixels (B, 3, H, W) in [0, 1], packed text (B, L), perhaps hard negatives (B, 3, H, W)."""
        pixels, packed, *negatives = batch
        text = model.encode_text(packed).float()
        images, *negatives = model.encode_image(torch.cat([pixels, *negatives])).float().split(len(pixels))
        all_text, all_images = part.gather(text), part.gather(images)  # (processes * B, E)
        if len(all_text) != part.count * len(text):
            raise ValueError(
                "CLIP compares every caption with every image of the batch, which passes over parts cannot; "
                "set grad_accum_steps to 1, and lower batch_size or start more processes to save memory"
            )
        scale = model.logit_scale()
        own = part.index * len(pixels) + torch.arange(len(pixels), device=pixels.device)
        to_text, to_images = scale * images @ all_text.T, scale * text @ all_images.T
        total = (F.cross_entropy(to_text, own) + F.cross_entropy(to_images, own)) / 2
        right = (to_text.argmax(dim=1) == own).float().mean()
        metrics = {"image_to_text_acc": right, "logit_scale": scale.detach()}
        if negatives:
            to_negatives = scale * text @ part.gather(negatives[0]).T
            total = total + F.cross_entropy(torch.cat([to_images, to_negatives], dim=1), own)
            metrics["hard_negative_acc"] = ((images - negatives[0]) * text).sum(dim=1).gt(0).float().mean()
        return Loss(total, metrics)

    def step_cost(self, model: CLIP, batch: tuple[Tensor, ...]) -> StepCost:
        """Pairs only: open_clip's towers have no formula here."""
        return StepCost(len(batch[0]))

"""Training objective of CLIP: the symmetric contrastive loss (Radford et al. 2021, Figure 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.clip.model import CLIP
from dalle.types import FULL_BATCH, BatchShard, Loss, StepCost


class CLIPObjective:
    """Symmetric cross-entropy over the scaled cosines of a batch (Radford et al., Figure 3).

    A batch may also hold images that no caption describes, one beside each pair: then each caption must
    prefer its image to all of these too. Every caption meets the images of all processes, and so for the
    images.
    """

    def __call__(
        self, model: CLIP, batch: tuple[Tensor, ...], step: int, part: BatchShard = FULL_BATCH
    ) -> Loss:
        """batch: pixels (B, 3, H, W) in [0, 1], packed text (B, L), perhaps other images (B, 3, H, W)."""
        pixels, packed, *others = batch
        text = model.encode_text(packed).float()
        images, *spoilt = model.encode_image(torch.cat([pixels, *others])).float().split(len(pixels))
        all_text, all_images = part.gather(text), part.gather(images)  # (processes * B, E)
        scale, own = (
            model.logit_scale(),
            part.index * len(pixels) + torch.arange(len(pixels), device=pixels.device),
        )
        to_text, to_images = scale * images @ all_text.T, scale * text @ all_images.T
        total = (F.cross_entropy(to_text, own) + F.cross_entropy(to_images, own)) / 2
        right = (to_text.argmax(dim=1) == own).float().mean()
        metrics = {"image_to_text_acc": right, "logit_scale": scale.detach()}
        if spoilt:  # a caption's own image stands at its number among all images, whole and broken
            to_spoilt = scale * text @ part.gather(spoilt[0]).T
            total = total + F.cross_entropy(torch.cat([to_images, to_spoilt], dim=1), own)
            metrics["hard_negative_acc"] = ((images - spoilt[0]) * text).sum(dim=1).gt(0).float().mean()
        return Loss(total, metrics)

    def step_cost(self, model: CLIP, batch: tuple[Tensor, ...]) -> StepCost:
        """Pairs only: open_clip's towers have no formula here."""
        return StepCost(len(batch[0]))

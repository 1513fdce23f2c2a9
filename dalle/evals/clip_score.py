"""CLIP score: 2.5 max(cosine, 0) of images and their captions (Hessel et al. 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle.types import Embedder

WEIGHT = 2.5  # Hessel et al.


@torch.no_grad()
def clip_scores(clip: Embedder, pixels: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Cosine and CLIP score (B,) of pixels (B, 3, H, W) in [0, 1] and a caption for each."""
    if len(pixels) != len(captions):
        raise ValueError(f"{len(pixels)} images with {len(captions)} captions; expected one caption each")
    cosines = (clip.embed_images(pixels) * clip.embed_captions(captions)).sum(1)
    return {"cosine": cosines, "clip_score": WEIGHT * cosines.clamp(min=0)}

"""Ordering candidates by how well they fit the caption (paper section 2.6, Figure 9c)."""

import torch
from torch import Tensor

from dalle.types import Scorer


@torch.no_grad()
def rank(scorer: Scorer, pixels: Tensor, caption: str, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Best first; equal scores keep the order of the candidates.

    Args:
        scorer: any Scorer.
        pixels: (N, 3, H, W) in [0, 1].
        caption: the text.
        chunk: pictures scored at once.

    Returns:
        order int64 (N,) and scores (N,), both best first, on the CPU.
    """
    scores = torch.cat([scorer.score(part, caption).float().cpu() for part in pixels.split(chunk)])
    if not torch.isfinite(scores).all():
        raise ValueError(f"the scorer gave a score that is not finite for {caption!r}")
    order = torch.sort(scores, descending=True, stable=True).indices
    return order, scores[order]

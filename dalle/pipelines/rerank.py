"""Ordering candidates by how well they fit the caption (paper section 2.6, Figure 9c)."""

import torch
from torch import Tensor

from dalle.types import Scorer


@torch.no_grad()
def rank(scorer: Scorer, pixels: Tensor, caption: str, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """TopN first; equal scores keep the order of the candidates.

    Args:
        scorer: any Scorer.
        pixels: (N, 3, H, W) in [0, 1].
        caption: the text.
        chunk: images scored at once.

    Returns:
        order int64 (N,) and scores (N,), both best first, on the CPU.
    """
    scores = torch.cat([scorer.score(part, caption).float().cpu() for part in pixels.split(chunk)])
    if not torch.isfinite(scores).all():
        raise ValueError(f"the scorer gave a score that is not finite for {caption!r}")
    order = torch.sort(scores, descending=True, stable=True).indices
    return order, scores[order]


class TopN:
    """The n best candidates of those that came by; the others are forgotten, so memory does not grow.

    Args:
        n: how many to keep.
        caption: what they are ranked by.
        scorer: ranks them; without it the first n are kept, in order.
    """

    def __init__(self, n: int, caption: str, scorer: Scorer | None):
        self.n, self.caption, self.scorer = n, caption, scorer
        self.seen = 0
        self.kept: list[tuple[float, int, Tensor, Tensor]] = []
        """(score, candidate, tokens, pixels), best first; equal scores in the order of the candidates."""

    def add(self, tokens: Tensor, pixels: Tensor, first: int) -> None:
        """Takes the next candidates, numbered from `first`: tokens (N, h * w), pixels (N, 3, H, W)."""
        order, scores = torch.arange(len(tokens)), torch.zeros(len(tokens))
        if self.scorer is not None:
            order, scores = rank(self.scorer, pixels, self.caption, len(pixels))
        new = [
            (score, first + i, tokens[i].cpu(), pixels[i].cpu())
            for score, i in list(zip(scores.tolist(), order.tolist(), strict=True))[: self.n]
        ]
        self.kept = sorted(self.kept + new, key=lambda one: (-one[0], one[1]))[: self.n]
        self.seen += len(tokens)

"""Inception score: images that each look like one thing, and together like many (Salimans et al. 2016).

    exp( mean over images of KL( p(class | image), p(class) ) )

from 1 to the number of classes.
"""

import torch
from torch import Tensor

SPLITS = 10  # Salimans et al.


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over parts of the images, in an order drawn by the seed.

    Args:
        logits: (N, classes).
        splits: parts, of equal size within one image.
        seed: of the order.
    """
    if logits.ndim != 2 or len(logits) < splits or splits < 1:
        raise ValueError(
            f"{splits} parts need logits (N, classes) of as many images, got {tuple(logits.shape)}"
        )
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = [_score(part) for part in logits.cpu().double()[order].tensor_split(splits)]
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def _score(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    log_mean = log_p.logsumexp(0) - torch.tensor(len(log_p)).log()
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()

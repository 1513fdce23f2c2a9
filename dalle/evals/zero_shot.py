"""Zero-shot classification with CLIP: the class whose prompt fits best (Radford et al. 2021, 3.1.4).

A class is the mean of its name's embeddings in several wordings, made a unit vector.

    B images, C classes, E embedding width
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle.evals.config import TEMPLATES
from dalle.types import Embedder


@torch.no_grad()
def class_vectors(clip: Embedder, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Names of classes -> unit vectors (C, E).

    Raises:
        ValueError: fewer than two names, a name twice, or a template without its one {}.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"expected two or more class names, each once; got {list(names)[:5]}")
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"template {wrong[0]!r} must have {{}} once, where the class's name goes")
    if not templates:
        raise ValueError('no templates; give one or more, for example "a photo of a {}."')
    wordings = [
        clip.embed_captions([template.replace("{}", name) for name in names]) for template in templates
    ]
    return torch.nn.functional.normalize(torch.stack(wordings).mean(0), dim=1)


@torch.no_grad()
def predictions(clip: Embedder, pixels: Tensor, classes: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) -> classes int64 (B, C), best first."""
    return (clip.embed_images(pixels) @ classes.T).argsort(dim=1, descending=True, stable=True)


def accuracy(ranked: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of images whose class (B,) is the first, and among the first five, of those ranked (B, C)."""
    hits = ranked == labels.to(ranked.device)[:, None]
    found = {f"acc_top_{k}": float(hits[:, :k].any(1).double().mean()) for k in (1, 5) if k < ranked.shape[1]}
    return found | {"acc_chance": 1 / ranked.shape[1]}

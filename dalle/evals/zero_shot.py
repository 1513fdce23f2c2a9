"""Zero-shot classification with CLIP: the class whose prompts fit best (Radford et al. 2021, 3.1.4).

B images, C classes, E embedding width
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle.evals.config import TEMPLATES
from dalle.types import Embedder


@torch.no_grad()
def class_vectors(clip: Embedder, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Unit vectors (C, E): the mean embedding of each class name in all templates, each with {} once."""
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"expected two or more class names, each once; got {list(names)[:5]}")
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"templates must be one or more, each with {{}} once, got {list(templates)}")
    prompts = [[template.replace("{}", name) for name in names] for template in templates]
    vectors = torch.stack([clip.embed_captions(one) for one in prompts])
    return torch.nn.functional.normalize(vectors.mean(0), dim=1)


@torch.no_grad()
def predictions(clip: Embedder, pixels: Tensor, classes: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) -> classes int64 (B, C), best first."""
    return (clip.embed_images(pixels) @ classes.T).argsort(dim=1, descending=True, stable=True)


def accuracy(ranked: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy of ranked classes (B, C) for labels (B,), and that of chance."""
    hits = ranked == labels.to(ranked.device)[:, None]
    top = {f"acc_top_{k}": float(hits[:, :k].any(1).double().mean()) for k in (1, 5) if k < ranked.shape[1]}
    return top | {"acc_chance": 1 / ranked.shape[1]}

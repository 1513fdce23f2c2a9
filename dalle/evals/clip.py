"""Metrics of a CLIP: CLIP score, retrieval, zero-shot classification and typographic attack.

B images of a batch, P images, C captions or classes, E embedding width
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor

from dalle.evals.config import TEMPLATES
from dalle.evals.running_mean import MeanMetric
from dalle.io.images import to_pil, to_tensor
from dalle.precision import cosines
from dalle.types import Embedder

WEIGHT = 2.5  # of the CLIP score, Hessel et al.
WIDTH, HEIGHT = 0.9, 0.25  # of a label, at most, relative to the image


@torch.no_grad()
def clip_scores(clip: Embedder, pixels: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Cosine and CLIP score 2.5 max(cosine, 0), each (B,) (Hessel et al. 2021).

    Pixels are (B, 3, H, W) in [0, 1], with a caption for each.
    """
    if len(pixels) != len(captions):
        raise ValueError(f"{len(pixels)} images with {len(captions)} captions; expected one caption each")
    cosine = (clip.embed_images(pixels).float() * clip.embed_captions(captions).float()).sum(1)
    return {"cosine": cosine, "clip_score": WEIGHT * cosine.clamp(min=0)}


def retrieval(
    images: Tensor, captions: Tensor, owners: Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[str, float]]:
    """R@k of captions by images and of images by captions (Radford et al. 2021, section 3.1; Table 13).

    The share of queries whose answer is among the k highest cosines; ties count as misses.

    Args:
        images, captions: unit vectors (P, E) and (C, E).
        owners: the image of each caption; any caption of an image answers it, and every image must have one.
        ks: values of k; those that every query reaches are left out.
    """
    owner = torch.as_tensor(owners, device=images.device)
    numbers = torch.arange(len(images), device=images.device)
    if not torch.equal(owner.unique(), numbers):
        raise ValueError(f"each of the {len(images)} images must have a caption")
    own = owner == numbers[:, None]  # (P, C)
    cosine = cosines(images, captions)
    best_own = cosine.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    wrong_captions = ((cosine >= best_own) & ~own).sum(1)  # at least as near as the best own caption
    answers = cosine.gather(0, owner[None])  # (1, C)
    wrong_images = ((cosine >= answers) & ~own).sum(0)
    wrong = {"image_to_text_acc": wrong_captions, "text_to_image_acc": wrong_images}
    among = {"image_to_text_acc": len(captions), "text_to_image_acc": len(images)}
    return {
        name: {f"R@{k}": float((wrong[name] < k).cpu().double().mean()) for k in ks if k < among[name]}
        for name in wrong
    }


@torch.no_grad()
def class_vectors(clip: Embedder, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Unit vectors (C, E): the mean embedding of each class name in all templates, each with {} once."""
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"templates must be one or more, each with {{}} once, got {list(templates)}")
    prompts = [[template.replace("{}", name) for name in names] for template in templates]
    vectors = torch.stack([clip.embed_captions(one) for one in prompts])
    return torch.nn.functional.normalize(vectors.float().mean(0), dim=1)


@torch.no_grad()
def zero_shot(clip: Embedder, pixels: Tensor, classes: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) -> classes int64 (B, C), best first (Radford et al. 2021, 3.1.4)."""
    return cosines(clip.embed_images(pixels), classes).argsort(dim=1, descending=True, stable=True)


def accuracy(ranked: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy of ranked classes (B, C) for labels (B,), and that of chance."""
    hits = (ranked == labels.to(ranked.device)[:, None]).cpu()
    top = {f"acc_top_{k}": float(hits[:, :k].any(1).double().mean()) for k in (1, 5) if k < ranked.shape[1]}
    return top | {"acc_chance": 1 / ranked.shape[1]}


def typographic_attack(
    clip: Embedder, batches: Iterable[tuple[Tensor, Tensor]], names: Sequence[str], classes: Tensor, seed: int
) -> dict[str, float]:
    """Accuracy before and after a wrong class name is written on each image (Goh et al. 2021).

    Batches are pixels (B, 3, H, W) in [0, 1] and labels int64 (B,); `classes` are the `class_vectors` of the
    names. attack_success and attack_success_clean are the fractions predicted as the written name, with and
    without it on the image.
    """
    rng, means = np.random.default_rng(seed), MeanMetric()
    for pixels, labels in batches:
        words = (labels + torch.from_numpy(rng.integers(1, len(names), size=len(labels)))) % len(names)
        attacked = write_words(pixels, [names[i] for i in words], rng).to(pixels.device)
        before, after = (zero_shot(clip, part, classes)[:, 0].cpu() for part in (pixels, attacked))
        means.add({"acc_clean": before == labels, "acc_attacked": after == labels})
        means.add({"attack_success": after == words, "attack_success_clean": before == words})
    return means.values()


def write_words(pixels: Tensor, words: Sequence[str], rng: np.random.Generator) -> Tensor:
    """Each image (B, 3, H, W) with its word on a white label at a random position, as large as fits."""
    images = to_pil(pixels)
    for image, word in zip(images, words, strict=True):
        canvas = ImageDraw.Draw(image)
        points = max(6, int(HEIGHT * image.height))
        while points > 6 and ImageFont.load_default(points).getlength(word) > WIDTH * image.width:
            points -= 1
        font = ImageFont.load_default(points)
        left, top, right, bottom = canvas.textbbox((0, 0), word, font=font)
        x = int(rng.integers(max(1, image.width - (right - left) + 1)))
        y = int(rng.integers(max(1, image.height - (bottom - top) + 1)))
        canvas.rectangle((x - 1, y - 1, x + right - left, y + bottom - top), fill="white")
        canvas.text((x - left, y - top), word, font=font, fill="black")
    return to_tensor(images)

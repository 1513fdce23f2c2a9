"""Typographic attack: does a CLIP follow a wrong class name written on the image (Goh et al. 2021)?

B images, C classes
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor

from dalle.evals.running_mean import MeanMetric
from dalle.evals.zero_shot import predictions
from dalle.io.images import to_pil, to_tensor
from dalle.types import Embedder

WIDTH, HEIGHT = 0.9, 0.25  # of a label, at most, relative to the image


def run(
    clip: Embedder,
    batches: Iterable[tuple[Tensor, Tensor]],
    names: Sequence[str],
    classes: Tensor,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy before and after a wrong class name is written on each image.

    Batches are pixels (B, 3, H, W) in [0, 1] and labels int64 (B,); `classes` are the vectors (C, E) of the
    names, by `zero_shot.class_vectors`. attack_success and attack_success_clean are the fractions predicted
    as the written name, with and without it on the image.
    """
    rng, means = np.random.default_rng(seed), MeanMetric()
    for pixels, labels in batches:
        labels = labels.cpu()
        words = (labels + torch.from_numpy(rng.integers(1, len(names), size=len(labels)))) % len(names)
        attacked = write_words(pixels, [names[i] for i in words], rng).to(pixels.device)
        before, after = (predictions(clip, part, classes)[:, 0].cpu() for part in (pixels, attacked))
        means.add({"acc_clean": before == labels, "acc_attacked": after == labels})
        means.add({"attack_success": after == words, "attack_success_clean": before == words})
    return means.values()


def write_words(pixels: Tensor, words: Sequence[str], rng: np.random.Generator) -> Tensor:
    """Each image (B, 3, H, W) with its word on a white label at a random position, as large as fits."""
    images = to_pil(pixels)
    for image, word in zip(images, words, strict=True):
        canvas = ImageDraw.Draw(image)
        font = _font(word, WIDTH * image.width, HEIGHT * image.height)
        left, top, right, bottom = canvas.textbbox((0, 0), word, font=font)
        x = int(rng.integers(max(1, image.width - (right - left) + 1)))
        y = int(rng.integers(max(1, image.height - (bottom - top) + 1)))
        canvas.rectangle((x - 1, y - 1, x + right - left, y + bottom - top), fill="white")
        canvas.text((x - left, y - top), word, font=font, fill="black")
    return to_tensor(images)


def _font(word: str, width: float, height: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font at the largest size at which the word fits, 6 points at least."""
    for size in range(max(6, int(height)), 6, -1):
        font = ImageFont.load_default(size)
        if font.getlength(word) <= width:
            return font
    return ImageFont.load_default(6)

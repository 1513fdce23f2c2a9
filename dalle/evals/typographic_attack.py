"""Typographic attack: does a CLIP follow a wrong class name written on the image (Goh et al. 2021)?

A CLIP that reads takes an apple with "iPod" on it for an iPod. Reranking by such a CLIP prefers images with
words.

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

WIDTH = 0.9  # of the image's width that a label takes at most
HEIGHT = 0.25  # and of its height


def run(
    clip: Embedder,
    batches: Iterable[tuple[Tensor, Tensor]],
    names: Sequence[str],
    classes: Tensor,
    seed: int = 0,
) -> dict[str, float]:
    """Predictions before and after a wrong name is written on each image.

    Args:
        clip: names the images.
        batches: pixels (B, 3, H, W) in [0, 1] and the class of each, int64 (B,).
        names: of the C classes.
        classes: their vectors (C, E), by `zero_shot.class_vectors`.
        seed: of the wrong names and their positions.

    Returns:
        acc_clean, acc_attacked: accuracy without and with the word; attack_success: fraction predicted as the
        word says; attack_success_clean: fraction predicted so without the word.
    """
    rng, means = np.random.default_rng(seed), MeanMetric()
    for pixels, labels in batches:
        labels = labels.cpu()
        words = (labels + torch.from_numpy(rng.integers(1, len(names), size=len(labels)))) % len(names)
        written = write_words(pixels, [names[i] for i in words], rng).to(pixels.device)
        before, after = (predictions(clip, part, classes)[:, 0].cpu() for part in (pixels, written))
        means.add(
            {
                "acc_clean": before == labels,
                "acc_attacked": after == labels,
                "attack_success": after == words,
                "attack_success_clean": before == words,
            }
        )
    return means.values()


def write_words(pixels: Tensor, words: Sequence[str], rng: np.random.Generator) -> Tensor:
    """Each image (B, 3, H, W) with its word on a white label, anywhere in it, as large as fits."""
    images = to_pil(pixels)
    for image, word in zip(images, words, strict=True):
        pen, (width, height) = ImageDraw.Draw(image), image.size
        font = _font(word, WIDTH * width, HEIGHT * height)
        left, top, right, bottom = pen.textbbox((0, 0), word, font=font)
        x, y = (
            int(rng.integers(max(1, free + 1))) for free in (width - (right - left), height - (bottom - top))
        )
        pen.rectangle((x - 1, y - 1, x + right - left, y + bottom - top), fill="white")
        pen.text((x - left, y - top), word, font=font, fill="black")
    return to_tensor(images)


def _font(word: str, width: float, height: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font at the largest size at which the word fits, 6 points at least."""
    for size in range(max(6, int(height)), 6, -1):
        font = ImageFont.load_default(size)
        if font.getlength(word) <= width:
            return font
    return ImageFont.load_default(6)

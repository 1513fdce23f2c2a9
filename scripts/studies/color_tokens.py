"""Token sequences of the shapes without trained tokenizers, and plots of curves, for the training studies.

A sequence holds the words of a caption and the colors of 12 x 12 pixels, rounded to 64.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.layout import TokenLayout
from dalle.shapes.dataset import GRID, ShapesDataset, render
from dalle.transformer import TransformerConfig

LEVELS = 4  # of each color channel


def small_transformer(depth: int, head_dim: int, attention_backend: str) -> TransformerConfig:
    """A transformer whose image tokens are colors of pixels."""
    return TransformerConfig(
        depth=depth,
        heads=2,
        head_dim=head_dim,
        text_len=18,
        grid=(GRID, GRID),
        text_vocab=64,
        image_vocab=LEVELS**3,
        init_scale=1.0,
        attention_backend=attention_backend,
    )


class ColorTokens:
    """Joint ids of rendered shapes."""

    def __init__(self, layout: TokenLayout, seed: int):
        self.layout, self.dataset = layout, ShapesDataset(16, seed)
        captions = self.dataset.captions(range(1000))
        words = sorted({word for texts in captions for text in texts for word in text.split()})
        self.word_ids = {word: i for i, word in enumerate(words, 1)}  # 0: any other word

    def __call__(self, indices: range) -> Tensor:
        """int64 (B, N) of these samples."""
        pixels = render(*self.dataset.scenes_and_boxes(indices), GRID)
        levels = (pixels * LEVELS).clip(0, LEVELS - 1).astype(np.int64)
        red, green, blue = np.moveaxis(levels, 1, 0)  # each (B, 12, 12)
        codes = (red * LEVELS + green) * LEVELS + blue
        captions = [texts[0].split() for texts in self.dataset.captions(indices)]
        ids = [[self.word_ids.get(word, 0) for word in words] for words in captions]
        text = self.layout.pad_text(ids, truncate=True)
        return self.layout.pack(text, torch.from_numpy(codes.reshape(len(codes), -1)))


def plot_curves(axis: Any, title: str, curves: dict[str, list[float]], window: int) -> None:
    """Running means over `window` updates; a logarithmic axis where all values are positive."""
    for name, values in curves.items():
        means = np.convolve(values, np.full(window, 1 / window), mode="valid")
        axis.plot(np.arange(window, len(values) + 1), means, linewidth=1, label=name)
    if min(map(min, curves.values())) > 0:
        axis.set_yscale("log")
    axis.legend(fontsize=7)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("update", fontsize=8)

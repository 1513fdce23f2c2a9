"""Small transformers whose image tokens are colors of pixels, for studies of training.

A sequence holds the words of a caption and the colors of 12 x 12 pixels, rounded to 64.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.benchmarks.common import Stepper
from dalle.config import configuration
from dalle.layout import TokenLayout
from dalle.shapes.dataset import GRID, ShapesDataset, render
from dalle.train.config import OptimizerConfig
from dalle.transformer import TransformerConfig
from dalle.transformer.objective import TransformerObjective

CPU = torch.device("cpu")
LEVELS = 4  # of each color channel
SMALL = TransformerConfig(
    depth=4,
    heads=2,
    head_dim=32,
    text_len=18,
    grid=(GRID, GRID),
    text_vocab=64,
    image_vocab=LEVELS**3,
    init_scale=1.0,
    attention_backend="dense",
)


@configuration
class TrainingStudy:
    """What the studies take that train a small transformer with several methods."""

    model: TransformerConfig = SMALL
    """Shape of the transformer; image tokens are the pixels of 12 x 12 images."""
    steps: int = 300
    """Updates of each training."""
    batch_size: int = 8
    """Images of a process in an update."""
    lr: float = 2e-3
    """Learning rate of AdamW after the warm-up."""
    seed: int = 0
    """Seed of weights and images."""
    plot: Path | None = None
    """File for the curves."""
    json: Path | None = None
    """File for the report."""

    def stepper(self, precision: str, optimizer: OptimizerConfig) -> Stepper:
        """The model before its first update."""
        objective = TransformerObjective()
        return Stepper("transformer", self.model, objective, CPU, precision, optim=optimizer, seed=self.seed)


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


def plot_losses(axis: Any, curves: dict[str, list[float]], window: int) -> None:
    """Running means over `window` updates on a logarithmic axis."""
    for name, values in curves.items():
        means = np.convolve(values, np.full(window, 1 / window), mode="valid")
        axis.plot(np.arange(window, len(values) + 1), means, linewidth=1, label=name)
    axis.set_yscale("log")
    axis.legend(fontsize=7)
    axis.set_title("loss", fontsize=9)
    axis.set_xlabel("update", fontsize=8)

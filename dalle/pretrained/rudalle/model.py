"""The transformer of ruDALL-E (Sber: Malevich, Emojich, Surrealist XL, Kandinsky), for sampling.

128 text ids between begin and end marks, each empty position with its own pad, and 32 x 32 image tokens. Row
and column masks are ours; the last layer sees a square around each token. The weights of its two versions are
not interchangeable:

    v2    another begin mark in front shifts the inputs by one but not the masks, to which the last text id is
          the first image token. The square wraps around all borders of the image
    v3    no mark in front: no state predicts the first text id. The square ends at the border

The package's measure against overflow in fp16 (CogView's "PB-relax") changes nothing in fp32 and is omitted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle.nn.blocks import FP32LayerNorm
from dalle.pretrained.external_transformer import ExternalConfig, ExternalLayout, ExternalTransformer

VERSIONS = ("v2", "v3")
BEGIN, END = 2, 3  # ids of text
REACH = 5  # of the square, to each side


@dataclass(frozen=True, kw_only=True)
class RudalleConfig(ExternalConfig):
    """Shape of the transformer, by default of the published XL. `text_len` counts begin and end."""

    width: int = 2048
    heads: int = 16
    text_len: int = 128
    grid: tuple[int, int] = (32, 32)
    text_vocab: int = 16384
    image_vocab: int = 8192
    gelu: str = "tanh"
    sandwich: bool = True
    max_attention: float | None = 65504.0  # the largest number of fp16
    depth: int = 24  # layers
    version: str = "v3"  # one of VERSIONS

    @property
    def layout(self) -> ExternalLayout:
        sizes = self.text_len, self.grid, self.text_vocab, self.image_vocab
        start = BEGIN if self.version == "v2" else None
        return ExternalLayout(*sizes, start=start, zero_is_pad=True, frame=(BEGIN, END))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of mask of each layer: row, column, row, row, ...; the last a square unless it is a column."""
        last = self.depth - 1
        return tuple("column" if i % 4 == 1 else "square" if i == last else "row" for i in range(self.depth))

    @property
    def prefix_len(self) -> int:
        """See `ExternalConfig`: to the masks of v2, the last text id is the first image token."""
        return self.text_len

    def image_mask(self, kind: str) -> Tensor:
        if kind != "square":
            return super().image_mask(kind)
        side = self.grid[0]
        index = torch.arange(side * side)
        mask = index[:, None] >= index
        for axis in (index // side, index % side):
            distance = (axis[:, None] - axis).abs()
            if self.version == "v2":
                distance = torch.minimum(distance, side - distance)
            mask &= distance <= REACH
        return mask


class Rudalle(ExternalTransformer):
    """Two norms precede the output matrix: the last layer's and its own."""

    def __init__(self, config: RudalleConfig):
        super().__init__(config)
        layout, width = self.layout, config.width
        self.text_embedding = nn.Embedding(layout.image_offset, width)
        self.image_embedding = nn.Embedding(layout.image_vocab, width)
        self.text_position = nn.Embedding(layout.text_len + 1, width)
        self.row_position = nn.Embedding(layout.rows, width)
        self.column_position = nn.Embedding(layout.columns, width)
        self.final = nn.Sequential(FP32LayerNorm(width), FP32LayerNorm(width))
        self.to_logits = nn.Linear(width, layout.vocab)

    def embed_text(self, text: Tensor) -> Tensor:
        return self.text_embedding(text) + self.text_position.weight[: text.shape[1]]

    def embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        row, column = positions // self.layout.columns, positions % self.layout.columns
        return self.image_embedding(tokens) + (self.row_position(row) + self.column_position(column))

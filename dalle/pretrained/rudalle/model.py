"""The transformer of ruDALL-E (Sber: Malevich, Emojich, Surrealist XL, Kandinsky), for sampling.

128 text ids, between marks of begin and end, each empty position with an id of its own, and 32 x 32 image
tokens. Rows and columns see as ours do, and the last layer sees a square around each token. The weights of
its two versions do not fit each other:

    v2    another mark of begin in front, so every input is one later; the masks are not, so to them the last
          text id is the first image token. The square wraps around all borders of the image
    v3    no mark in front: no state predicts the first text id. The square ends at the border

What the package does against overflow in fp16 (CogView's "PB-relax") changes nothing in fp32, and is left
out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle.nn.blocks import FP32LayerNorm
from dalle.pretrained.external_blocks import BlockConfig
from dalle.pretrained.external_transformer import ExternalConfig, ExternalLayout, ExternalTransformer

VERSIONS = ("v2", "v3")
BEGIN, END = 2, 3  # ids of text
REACH = 5  # of the square, to each side
BOUND = 65504.0  # the largest number of fp16


@dataclass(frozen=True)
class RudalleLayout(ExternalLayout):
    """Captions between begin and end."""

    zero_is_pad: bool = True

    @property
    def max_caption_len(self) -> int:
        """Most tokens of a caption, without begin and end."""
        return self.text_len - 2

    def pad_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """See `TokenLayout.pad_text`; a caption that is cut loses its end first, as in the package."""
        if not truncate:
            super().pad_text(captions)  # says what is too long
        framed = [[BEGIN, *ids, END][: self.text_len] for ids in captions]
        plain = ExternalLayout(
            self.text_len, self.grid, self.text_vocab, self.image_vocab, self.start, self.zero_is_pad
        )
        return plain.pad_text(framed)


@dataclass(frozen=True)
class RudalleConfig(ExternalConfig):
    """Shape of the transformer, by default of the published XL. `text_len` counts begin and end."""

    width: int = 2048
    heads: int = 16
    text_len: int = 128
    grid: tuple[int, int] = (32, 32)
    text_vocab: int = 16384
    image_vocab: int = 8192
    depth: int = 24
    """Layers."""
    version: str = "v3"
    """One of VERSIONS."""
    sandwich: bool = True
    """A norm after each path too."""

    @property
    def layout(self) -> RudalleLayout:
        start = BEGIN if self.version == "v2" else None
        return RudalleLayout(self.text_len, self.grid, self.text_vocab, self.image_vocab, start)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each layer: row, column, row, row, and so on; the last a square unless it is a column."""
        last = self.depth - 1
        return tuple("column" if i % 4 == 1 else "square" if i == last else "row" for i in range(self.depth))

    @property
    def blocks(self) -> BlockConfig:
        return BlockConfig(self.width, self.heads, "tanh", sandwich=self.sandwich, bound=BOUND)

    @property
    def prefix_len(self) -> int:
        """See `ExternalConfig`: to the masks of v2, the last text id is the first image token."""
        return self.text_len

    def image_mask(self, kind: str) -> Tensor:
        side = self.grid[0]
        index = torch.arange(side * side)
        back = index[:, None] - index
        if kind == "row":
            near = back <= side
        elif kind == "column":
            near = back % side == 0
        else:
            near = torch.ones_like(back, dtype=torch.bool)
            for axis in (index // side, index % side):
                apart = (axis[:, None] - axis).abs()
                near &= (torch.minimum(apart, side - apart) if self.version == "v2" else apart) <= REACH
        return near & (back >= 0)


class Rudalle(ExternalTransformer):
    """Two norms stand before the output matrix: the last layer's and its own."""

    def __init__(self, config: RudalleConfig):
        super().__init__(config)
        layout, width = config.layout, config.width
        self.text_embedding = nn.Embedding(layout.image_offset, width)
        self.image_embedding = nn.Embedding(layout.image_vocab, width)
        self.text_position = nn.Embedding(layout.text_len + 1, width)
        self.row_position, self.column_position = (nn.Embedding(layout.rows, width) for _ in range(2))
        self.final = nn.Sequential(FP32LayerNorm(width), FP32LayerNorm(width))
        self.to_logits = nn.Linear(width, layout.vocab)

    def embed_text(self, text: Tensor) -> Tensor:
        return self.text_embedding(text) + self.text_position.weight[: text.shape[1]]

    def embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        row, column = positions // self.layout.columns, positions % self.layout.columns
        return self.image_embedding(tokens) + (self.row_position(row) + self.column_position(column))

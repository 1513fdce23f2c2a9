"""The transformer of ruDALL-E (Sber: Malevich, Emojich, Surrealist XL, Kandinsky), to draw with.

128 text ids, between marks of begin and end, each empty slot with an id of its own, and 32 x 32 image tokens. Rows and
columns see as ours do, and the last layer a square around each token. There are two versions, whose weights do not
fit each other:

    v2    one more mark of begin in front of all, and all slots one later; the masks are not, so for them the last
          text id is the first image token. The square goes on at the other side of the image, also from top to bottom
    v3    no mark in front: no state predicts the first text id. The square ends at the border

What the package does against overflow in fp16 (CogView's "PB-relax") changes nothing in fp32, and is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle.nn.blocks import FP32LayerNorm
from dalle.pretrained.external_blocks import BlockConfig, PlainTransformer, fp32_logits
from dalle.pretrained.external_transformer import ForeignLayout

VERSIONS = ("v2", "v3")
BEGIN, END = 2, 3  # ids of text
REACH = 5  # of the square, to each side
BOUND = 65504.0  # the largest number of fp16


@dataclass(frozen=True)
class RudalleLayout(ForeignLayout):
    """Captions between begin and end."""

    zero_is_pad: bool = True

    @property
    def max_caption_len(self) -> int:
        """Most tokens of a caption, beside begin and end."""
        return self.text_len - 2

    def pad_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """See `TokenLayout.pad_text`; a caption that is cut loses its end first, as in the package."""
        if not truncate:
            super().pad_text(captions)  # says what is too long
        framed = [[BEGIN, *ids, END][: self.text_len] for ids in captions]
        plain = ForeignLayout(
            self.text_len, self.grid, self.text_vocab, self.image_vocab, self.start, self.zero_is_pad
        )
        return plain.pad_text(framed)


@dataclass(frozen=True)
class RudalleConfig:
    """Shape of it; the defaults are those of the published XL."""

    width: int = 2048
    """D."""
    depth: int = 24
    """Layers."""
    heads: int = 16
    """Attention heads."""
    text_len: int = 128
    """Text ids, begin and end among them."""
    grid: tuple[int, int] = (32, 32)
    """Rows and columns of image tokens, equal."""
    text_vocab: int = 16384
    """Text ids without the pads."""
    image_vocab: int = 8192
    """Codes of the image tokenizer."""
    version: str = "v3"
    """One of VERSIONS."""
    sandwich: bool = True
    """A norm after each path too."""

    @property
    def layout(self) -> RudalleLayout:
        """Lengths and offsets of the stream."""
        start = BEGIN if self.version == "v2" else None
        return RudalleLayout(self.text_len, self.grid, self.text_vocab, self.image_vocab, start)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each layer: row, column, row, row, and so on, and the square last where no column is due."""
        last = self.depth - 1
        return tuple("column" if i % 4 == 1 else "square" if i == last else "row" for i in range(self.depth))

    @property
    def blocks(self) -> BlockConfig:
        """Shape of a layer."""
        return BlockConfig(self.width, self.heads, "tanh", sandwich=self.sandwich, bound=BOUND)


def image_sees(kind: str, side: int, version: str) -> Tensor:
    """bool (N, N): which image slots each sees, by raster index; each itself and what comes before it."""
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
            near &= (torch.minimum(apart, side - apart) if version == "v2" else apart) <= REACH
    return near & (back >= 0)


class Rudalle(PlainTransformer):
    """Two norms stand before the output matrix: the last layer's and its own."""

    def __init__(self, config: RudalleConfig):
        layout, width = config.layout, config.width
        with torch.device("cpu"):  # made anew, so they must have values when the rest is made without
            sees = {kind: image_sees(kind, layout.rows, config.version) for kind in sorted(set(config.kinds))}
        super().__init__(config, config.kinds, sees, layout.text_len)
        self.text_embedding = nn.Embedding(layout.image_offset, width)
        self.image_embedding = nn.Embedding(layout.image_vocab, width)
        self.text_position = nn.Embedding(layout.text_len + 1, width)
        self.row_position, self.column_position = (nn.Embedding(layout.rows, width) for _ in range(2))
        self.final_norm, self.logits_norm = FP32LayerNorm(width), FP32LayerNorm(width)
        self.to_logits = nn.Linear(width, layout.vocab)

    def embed_text(self, text: Tensor) -> Tensor:
        """See `PlainTransformer`."""
        return self.text_embedding(text) + self.text_position.weight[: text.shape[1]]

    def embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """See `PlainTransformer`."""
        columns = self.layout.columns
        places = self.row_position(positions // columns) + self.column_position(positions % columns)
        return self.image_embedding(tokens) + places

    def final(self, x: Tensor) -> Tensor:
        """See `PlainTransformer`."""
        return self.logits_norm(self.final_norm(x))

    def text_logits(self, hidden: Tensor, slots: Tensor | None = None) -> Tensor:
        """States (..., D) of text slots -> fp32 (..., text_vocab + T), every pad everywhere."""
        return self._logits(hidden, slice(None, self.layout.image_offset))

    def image_logits(self, hidden: Tensor) -> Tensor:
        """States (..., D) of image slots -> fp32 (..., image_vocab)."""
        return self._logits(hidden, slice(self.layout.image_offset, None))

    def _logits(self, hidden: Tensor, part: slice) -> Tensor:
        return fp32_logits(hidden, self.to_logits.weight[part], self.to_logits.bias[part])

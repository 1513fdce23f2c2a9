"""The transformer of minDALL-E 1.3B (Kakao Brain), for sampling.

64 text ids and 256 image tokens, each of which sees all before it. There is no start: the state of the last
text id predicts the first image token, and no state predicts the first text id. Empty text positions hold the
id of [PAD].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle.nn.blocks import FP32LayerNorm
from dalle.pretrained.external_blocks import BlockConfig
from dalle.pretrained.external_transformer import (
    ExternalConfig,
    ExternalLayout,
    ExternalTransformer,
    fp32_logits,
)


@dataclass(frozen=True)
class MinDalleLayout(ExternalLayout):
    """Text ids, filled up with one `pad`, then image tokens."""

    start: int | None = None
    pad: int = 0

    @property
    def image_offset(self) -> int:
        """Joint id of image code 0: no position has a pad of its own."""
        return self.text_vocab

    def pad_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """See `TokenLayout.pad_text`."""
        tokens = super().pad_text(captions, truncate)
        return torch.where(tokens >= self.text_vocab, self.pad, tokens)

    def loss_mask(self, ids: Tensor) -> Tensor:
        """Every image token, every caption token but the first, and the first pad."""
        text, image = self.unpack(ids)
        is_pad = text == self.pad
        counts = ~is_pad | (is_pad & (is_pad.cumsum(dim=1) == 1))
        counts[:, : self.unpredicted] = False
        return torch.cat([counts, torch.ones_like(image, dtype=torch.bool)], dim=1)

    def allowed_text(self, device: torch.device | None = None) -> Tensor:
        """bool (T, text_vocab): any id anywhere."""
        return torch.ones(self.text_len, self.text_vocab, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class MinDalleConfig(ExternalConfig):
    """Shape of the transformer; the defaults are the published model's. `text_vocab` counts [PAD]."""

    width: int = 1536
    heads: int = 24
    text_len: int = 64
    grid: tuple[int, int] = (16, 16)
    text_vocab: int = 16384
    image_vocab: int = 16384
    depth: int = 42
    """Layers."""
    pad: int = 0
    """The id of [PAD]."""
    attention_bias: bool = True
    """Of the matrices of attention."""
    mlp_bias: bool = True
    """Of the matrices of the MLP."""
    gelu: str = "exact"
    """Or "sigmoid": x sigmoid(1.702 x)."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each layer."""
        return ("causal",) * self.depth

    @property
    def layout(self) -> MinDalleLayout:
        return MinDalleLayout(self.text_len, self.grid, self.text_vocab, self.image_vocab, pad=self.pad)

    @property
    def blocks(self) -> BlockConfig:
        biases = {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        return BlockConfig(self.width, self.heads, self.gelu, matrices=3, **biases)

    def image_mask(self, kind: str) -> Tensor:
        return torch.ones(2 * (self.layout.num_image_tokens,), dtype=torch.bool).tril()


class MinDalle(ExternalTransformer):
    """`to_logits` is the output matrix of image tokens, `to_text_logits` that of text."""

    def __init__(self, config: MinDalleConfig):
        super().__init__(config)
        layout, width = config.layout, config.width
        self.text_embedding = nn.Embedding(layout.text_vocab, width)
        self.image_embedding = nn.Embedding(layout.image_vocab, width)
        self.text_position = nn.Embedding(layout.text_len, width)
        self.image_position = nn.Embedding(layout.num_image_tokens, width)
        self.final = FP32LayerNorm(width)
        self.to_text_logits = nn.Linear(width, layout.text_vocab, bias=False)
        self.to_logits = nn.Linear(width, layout.image_vocab, bias=False)

    def embed_text(self, text: Tensor) -> Tensor:
        return self.text_embedding(text) + self.text_position.weight[: text.shape[1]]

    def embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.image_embedding(tokens) + self.image_position(positions)

    def text_logits(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        return fp32_logits(hidden, self.to_text_logits)

    def image_logits(self, hidden: Tensor) -> Tensor:
        return fp32_logits(hidden, self.to_logits)

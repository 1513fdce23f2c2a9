"""The transformer of minDALL-E 1.3B (Kakao Brain), for sampling.

64 text ids and 256 image tokens, each of which sees all before it. There is no start: the state of the last
text id predicts the first image token, and no state predicts the first text id. Every pad is [PAD].
"""

from dataclasses import dataclass

from torch import Tensor, nn

from dalle.nn.blocks import FP32LayerNorm
from dalle.pretrained.external_transformer import (
    ExternalConfig,
    ExternalLayout,
    ExternalTransformer,
    fp32_logits,
)


@dataclass(frozen=True, kw_only=True)
class MinDalleConfig(ExternalConfig):
    """Shape of the transformer; the defaults are the published model's. `text_vocab` counts [PAD]."""

    width: int = 1536
    heads: int = 24
    text_len: int = 64
    grid: tuple[int, int] = (16, 16)
    text_vocab: int = 16384
    image_vocab: int = 16384
    qkv_matrices: int = 3
    depth: int = 42  # layers
    pad: int = 0  # the id of [PAD]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of mask of each layer."""
        return ("causal",) * self.depth

    @property
    def layout(self) -> ExternalLayout:
        sizes = self.text_len, self.grid, self.text_vocab, self.image_vocab
        return ExternalLayout(*sizes, start=None, pad=self.pad)


class MinDalle(ExternalTransformer):
    """`to_logits` is the output matrix of image tokens, `to_text_logits` that of text."""

    def __init__(self, config: MinDalleConfig):
        super().__init__(config)
        layout, width = self.layout, config.width
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

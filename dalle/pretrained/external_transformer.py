"""Transformers of DALLE-pytorch, minDALL-E and ruDALL-E: their common stream and cache.

They predict the first image token from the last text id, where ours reads start-of-image. So their inputs are
T + 1 text ids (a start and T ids), or T without a start, then image tokens, each read one position later than
it is predicted.

    B batch, n inputs of this call, T text_len, N image tokens, D width, d width of a head, V joint vocabulary
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.layout import TokenLayout
from dalle.nn.kv_cache import KVCache, KVCacheLayout
from dalle.pretrained.external_blocks import BlockConfig, Layer
from dalle.types import check_tokens


@dataclass(frozen=True)
class ExternalLayout(TokenLayout):
    """Text ids and image tokens behind one start, whose input id is `start`, or behind none.

    Args:
        start: input id at position 0; None has the first text id there, which nothing predicts.
        zero_is_pad: text id 0 stands for the pad of its position.
    """

    start: int | None = 0
    zero_is_pad: bool = False

    @property
    def max_caption_len(self) -> int:
        """Most tokens of a caption: all text positions."""
        return self.text_len

    @property
    def unpredicted(self) -> int:
        """Ids at the beginning that no state predicts: one where there is no start."""
        return int(self.start is None)

    @property
    def text_inputs(self) -> int:
        """Inputs before the image: the start, if there is one, and T ids."""
        return self.text_len + 1 - self.unpredicted

    def pad_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """See `TokenLayout.pad_text`."""
        tokens = super().pad_text(captions, truncate)
        if self.zero_is_pad:
            tokens = torch.where(tokens == 0, self.text_vocab + torch.arange(self.text_len), tokens)
        return tokens

    def shift(self, ids: Tensor) -> Tensor:
        """Joint ids (B, n) -> input ids, one more for the start; the last image token is never read."""
        if self.start is None:
            return ids[:, : self.seq_len - 1]
        return torch.cat([ids.new_full((len(ids), 1), self.start), ids], dim=1)[:, : self.seq_len]

    def loss_mask(self, ids: Tensor) -> Tensor:
        """See `TokenLayout.loss_mask`."""
        mask = super().loss_mask(ids)
        mask[:, : self.unpredicted] = False
        return mask


def stream_mask(image_mask: Tensor, prefix_len: int) -> Tensor:
    """bool (P + N, P + N): causal, all of the prefix seen by the image, image by image as (N, N) says."""
    length = prefix_len + len(image_mask)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[prefix_len:, prefix_len:] &= image_mask
    return mask


@dataclass(frozen=True)
class ExternalConfig(ABC):
    """Shape of an external transformer."""

    width: int
    """D."""
    heads: int
    """Attention heads."""
    text_len: int
    """T, text ids without the start."""
    grid: tuple[int, int]
    """Rows and columns of image tokens, equal."""
    text_vocab: int
    """Text ids without the pads of positions."""
    image_vocab: int
    """Codes of the image tokenizer."""

    @property
    @abstractmethod
    def layout(self) -> ExternalLayout:
        """Lengths and offsets of the stream."""

    @property
    @abstractmethod
    def blocks(self) -> BlockConfig:
        """Shape of a layer."""

    @property
    def prefix_len(self) -> int:
        """Inputs that every layer sees; a cache counts image positions from there."""
        return self.layout.text_inputs

    @abstractmethod
    def image_mask(self, kind: str) -> Tensor:
        """bool (N, N): which image tokens each sees in a layer of a kind, itself and some before it."""

    @property
    def vocabulary(self) -> str:
        """Its ids, for people."""
        codes = f"{self.image_vocab} codes in {self.grid[0]} rows"
        return f"{self.text_vocab} text ids, {self.text_len} at a time; {codes}"


class ExternalTransformer(nn.Module, ABC):
    """Joint ids -> logits, and what sampling asks of a transformer (see `dalle.transformer.Transformer`).

    A subclass adds embeddings, `final` (trunk -> final states) and `to_logits`; its config has `kinds`.
    """

    def __init__(self, config: ExternalConfig, layers: Iterable[nn.Module] | None = None):
        super().__init__()
        self.config, self.layout = config, config.layout
        self.layers = nn.ModuleList(layers or (Layer(config.blocks) for _ in config.kinds))
        self.patterns: dict[str, Tensor] = {}  # ours has some, and sampling in 16 bits asks for them
        with torch.device("cpu"):  # not in a file, so they need values when the rest is made without
            self.image_masks = {kind: config.image_mask(kind) for kind in sorted(set(config.kinds))}

    @abstractmethod
    def embed_text(self, text: Tensor) -> Tensor:
        """Input ids (B, t) of the first text inputs -> (B, t, D)."""

    @abstractmethod
    def embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Image tokens (B, p) at positions (p,) of the image -> (B, p, D)."""

    def trunk(self, x: Tensor) -> Tensor:
        """Embeddings -> what enters the first layer."""
        return x

    def rotation(self, inputs: Tensor) -> Tensor | None:
        """Rotary angles (n, r) of the inputs at these positions (n,)."""
        return None

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every position: joint ids (B, n) -> fp32 (B, n, V); the other modality has -inf.

        Those of a first text id that nothing predicts (`ExternalLayout.unpredicted`) mean nothing.
        """
        hidden = self.hidden(ids)
        text, image = hidden[:, : self.layout.text_len], hidden[:, self.layout.text_len :]
        logits = hidden.new_full((*hidden.shape[:2], self.layout.vocab), -torch.inf)
        logits[:, : text.shape[1], : self.layout.image_offset] = self.text_logits(text)
        logits[:, text.shape[1] :, self.layout.image_offset :] = self.image_logits(image)
        return logits

    def hidden(self, ids: Tensor) -> Tensor:
        """Joint ids (B, n) -> final states (B, n, D); state p reads ids before p, and is 0 if none does."""
        text, image = self.layout.unpack(ids)
        check_tokens(text, self.layout.image_offset, "text ids")
        check_tokens(image, self.layout.image_vocab, "image ids less their offset")
        lacking = self.layout.unpredicted
        states = self.prefill(self.layout.shift(ids)[:, : ids.shape[1] - lacking])
        return F.pad(states, (0, 0, lacking, 0))

    def prefill(self, inputs: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Input ids (B, n) -> final states (B, n, D); `caches` take what `decode_step` needs."""
        n, prefix = inputs.shape[1], self.config.prefix_len
        text, image = inputs.tensor_split([self.layout.text_inputs], dim=1)
        positions = torch.arange(n, device=inputs.device)
        image = self.embed_image(image - self.layout.image_offset, positions[: image.shape[1]])
        x = self.trunk(torch.cat([self.embed_text(text), image], dim=1))
        angles = self.rotation(positions)
        masks = {
            kind: stream_mask(m, prefix)[:n, :n].to(inputs.device) for kind, m in self.image_masks.items()
        }
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.kinds, strict=True)):
            x = layer(x, masks[kind], prefix, caches[i] if caches else None, angles)
        return self.final(x)

    def decode_step(self, tokens: Tensor, position: int | Tensor, caches: list[KVCache]) -> Tensor:
        """Reads image tokens (B,) of `position - 1` -> states (B, D) that predict those of the position."""
        last, inputs = position - 1, self.layout.text_inputs
        at = torch.tensor([last], device=tokens.device) if isinstance(last, int) else last
        x = self.trunk(self.embed_image(tokens[:, None], at)[:, 0])
        angles = self.rotation(inputs + at)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.step(x, cache, last + inputs - self.config.prefix_len, angles)
        return self.final(x)

    def text_logits(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """States (..., D) of text positions -> fp32 (..., ids of text), every pad everywhere."""
        return fp32_logits(hidden, self.to_logits, slice(self.layout.image_offset))

    def image_logits(self, hidden: Tensor) -> Tensor:
        """States (..., D) of image positions -> fp32 (..., image_vocab)."""
        return fp32_logits(hidden, self.to_logits, slice(self.layout.image_offset, None))

    def init_kv_caches(self, captions: int, candidates: int) -> list[KVCache]:
        """Empty caches, one a layer, for candidates of each caption, in the number format of the matrices."""
        blocks, like = self.config.blocks, self.layers[0].attention.f.out.weight
        layouts = {
            kind: KVCacheLayout(m, torch.arange(len(m))).to(like.device)
            for kind, m in self.image_masks.items()
        }
        shape = captions, candidates, blocks.heads, blocks.inner // blocks.heads, like
        return [self.new_cache(layouts[kind], *shape) for kind in self.config.kinds]

    def new_cache(self, *arguments) -> KVCache:
        """The empty cache of a layer, by `KVCache`'s arguments."""
        return KVCache(*arguments)

    def kv_bytes_per_sample(self) -> int:
        """Memory that sampling keeps of one candidate."""
        itemsize = self.layers[0].attention.f.out.weight.itemsize
        return 2 * len(self.layers) * self.layout.num_image_tokens * self.config.blocks.inner * itemsize


def fp32_logits(hidden: Tensor, linear: nn.Linear, rows: slice = slice(None)) -> Tensor:
    """States (..., D) by some rows of an output matrix -> fp32 logits, under any autocast."""
    bias = None if linear.bias is None else linear.bias[rows].float()
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), linear.weight[rows].float(), bias)

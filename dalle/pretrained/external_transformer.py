"""Base of the transformers of DALLE-pytorch, minDALL-E and ruDALL-E: token layout, passes, KV caches.

They predict the first image token from the last text id, where ours reads start-of-image. Their inputs are a
start token, if there is one, T text ids and the image tokens but the last.

    B batch, n inputs of this call, T text_len, N image tokens, D width, d head_dim, V joint vocabulary
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.config import configuration
from dalle.layout import TokenLayout
from dalle.masks import dense_mask
from dalle.nn.kv_cache import KVCache, KVCacheLayout, positions_in
from dalle.pretrained.external_blocks import BlockConfig, Layer
from dalle.transformer import Transformer


@dataclass(frozen=True)
class ExternalLayout(TokenLayout):
    """Text ids and image tokens, all text positions open to captions."""

    start: int | None = 0  # input id at position 0; None: it is the first text id, which nothing predicts
    zero_is_pad: bool = False  # text id 0 means the pad of its position
    pad: int | None = None  # the one pad of all positions; None if each has its own
    frame: tuple[int, int] | None = None  # ids before and after each caption

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "max_caption_len", self.text_len - len(self.frame or ()))
        if self.pad is not None:
            object.__setattr__(self, "image_offset", self.text_vocab)
            object.__setattr__(self, "vocab", self.text_vocab + self.image_vocab)

    @property
    def unpredicted(self) -> int:
        """Text ids at the beginning that no state predicts."""
        return int(self.start is None)

    @property
    def text_inputs(self) -> int:
        """Inputs before the image."""
        return self.text_len + 1 - self.unpredicted

    def pad_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """See `TokenLayout.pad_text`; a truncated caption loses its end mark first, as in the package."""
        tokens = super().pad_text(captions, truncate)
        if self.frame is not None:
            begin, end = self.frame
            framed = [[begin, *ids, end][: self.text_len] for ids in captions]
            return replace(self, frame=None).pad_text(framed)
        if self.pad is not None:
            tokens = tokens.where(tokens < self.text_vocab, self.pad)
        if self.zero_is_pad:
            tokens = tokens.where(tokens != 0, self.text_vocab + torch.arange(self.text_len))
        return tokens

    def shift(self, ids: Tensor) -> Tensor:
        """Joint ids (B, n) -> input ids, one more with a start; the last image token is never read."""
        if self.start is None:
            return ids[:, : self.seq_len - 1]
        return torch.cat([ids.new_full((len(ids), 1), self.start), ids], dim=1)[:, : self.seq_len]

    def loss_mask(self, ids: Tensor) -> Tensor:
        """See `TokenLayout.loss_mask`; without the text id that nothing predicts."""
        counts = super().loss_mask(ids if self.pad is None else ids.where(ids != self.pad, self.text_vocab))
        counts[:, : self.unpredicted] = False
        return counts


def stream_mask(image_mask: Tensor, prefix_len: int) -> Tensor:
    """bool (P + N, P + N): causal; the image sees all P inputs of the prefix, and itself by image_mask."""
    length = prefix_len + len(image_mask)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[prefix_len:, prefix_len:] &= image_mask
    return mask


MAX_LENGTH = 8192  # published are 1280 at most; masks take its square


@configuration(kw_only=True)
class ExternalConfig(BlockConfig, ABC):
    """Shape of an external transformer; a subclass has `kinds`, the kind of mask of each layer.

    `grid` is square, `text_vocab` has no pads of positions.
    """

    text_len: int
    grid: tuple[int, int]
    text_vocab: int
    image_vocab: int

    def __post_init__(self):
        super().__post_init__()
        if (length := self.text_len + self.grid[0] * self.grid[1]) > MAX_LENGTH:
            raise ValueError(f"a sequence of {length} positions, expected {MAX_LENGTH} at most")

    @property
    @abstractmethod
    def layout(self) -> ExternalLayout:
        """Lengths and offsets of the sequence."""

    @property
    def prefix_len(self) -> int:
        """Inputs that every layer sees; a cache counts image positions from there."""
        return self.layout.text_inputs

    def image_mask(self, kind: str) -> Tensor:
        """bool (N, N): image tokens that each sees in a layer of a kind; those of dalle/masks.py are ours."""
        return dense_mask(kind, self.layout)[self.text_len :, self.text_len :]


class ExternalTransformer(nn.Module, ABC):
    """Joint ids -> logits, with the methods of `dalle.transformer.Transformer` that sampling calls.

    A subclass adds `text_position`, other embeddings, `final` (trunk -> final states) and `to_logits`.
    """

    def __init__(self, config: ExternalConfig):
        super().__init__()
        self.config, self.layout = config, config.layout
        self.text_embedding = nn.Embedding(self.layout.image_offset, config.width)
        self.image_embedding = nn.Embedding(self.layout.image_vocab, config.width)
        self.layers = nn.ModuleList(self.new_layer(config) for _ in config.kinds)
        self.patterns: dict[str, Tensor] = {}  # as ours has, for sampling in 16 bits
        with torch.device("cpu"):  # not in a file, so computed even in a model without weights
            self.image_masks = {kind: config.image_mask(kind) for kind in sorted(set(config.kinds))}

    def embed_text(self, text: Tensor) -> Tensor:
        """Input ids (B, t) of the first text inputs -> (B, t, D)."""
        return self.text_embedding(text) + self.text_position.weight[: text.shape[1]]

    @abstractmethod
    def embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Image tokens (B, p) at image positions (p,) -> (B, p, D)."""

    def trunk(self, x: Tensor) -> Tensor:
        """Embeddings -> input of the first layer."""
        return x

    def rotation(self, inputs: Tensor) -> Tensor | None:
        """Rotary angles (n, r) of inputs (n,)."""
        return None

    forward = Transformer.forward  # the logits of a text id that nothing predicts have no meaning

    def hidden(self, ids: Tensor) -> Tensor:
        """Joint ids (B, n) -> final states (B, n, D); state p reads ids before p, and is 0 if none does."""
        missing = self.layout.unpredicted
        return F.pad(Transformer.hidden(self, ids[:, : ids.shape[1] - missing]), (0, 0, missing, 0))

    def prefill(self, inputs: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Input ids (B, n) -> final states (B, n, D); fills `caches` for `decode_step`."""
        n, prefix = inputs.shape[1], self.config.prefix_len
        text, image = inputs.tensor_split([self.layout.text_inputs], dim=1)
        positions = torch.arange(n, device=inputs.device)
        image = self.embed_image(image - self.layout.image_offset, positions[: image.shape[1]])
        x = self.trunk(torch.cat([self.embed_text(text), image], dim=1))
        angles = self.rotation(positions)
        masks = {k: stream_mask(m, prefix)[:n, :n].to(inputs.device) for k, m in self.image_masks.items()}
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.kinds, strict=True)):
            x = layer(x, masks[kind], prefix, caches[i] if caches else None, angles)
        return self.final(x)

    def decode_step(self, tokens: Tensor, position: int | Tensor, caches: list[KVCache]) -> Tensor:
        """Reads image tokens (B,) of `position - 1` -> states (B, D) that predict those of the position."""
        last, inputs = position - 1, self.layout.text_inputs
        at = torch.tensor([last], device=tokens.device) if isinstance(last, int) else last
        x = self.trunk(self.embed_image(tokens[:, None], at)[:, 0])
        angles = self.rotation(inputs + at)
        places = positions_in(caches, last + inputs - self.config.prefix_len)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.step(x, cache, places[cache.layout], angles)
        return self.final(x)

    def text_logits(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """States (..., D) of text positions -> fp32 (..., text ids), every pad everywhere."""
        return self.fp32_logits(hidden, self.to_logits, slice(self.layout.image_offset))

    def image_logits(self, hidden: Tensor) -> Tensor:
        """States (..., D) of image positions -> fp32 (..., image_vocab)."""
        return self.fp32_logits(hidden, self.to_logits, slice(self.layout.image_offset, None))

    def fp32_logits(self, hidden: Tensor, linear: nn.Linear, rows: slice = slice(None)) -> Tensor:
        """States (..., D) by some rows of an output matrix -> fp32 logits, under any autocast."""
        bias = None if linear.bias is None else linear.bias[rows].float()
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), linear.weight[rows].float(), bias)

    def init_kv_caches(
        self, captions: int, candidates: int, device: torch.device | str | None = None
    ) -> list[KVCache]:
        """As `Transformer.init_kv_caches`."""
        config, like = self.config, self.layers[0].attention.f.out.weight.new_empty(0, device=device)
        masks = self.image_masks.items()
        layouts = {kind: KVCacheLayout(m, torch.arange(len(m)), device=like.device) for kind, m in masks}
        shape = captions, candidates, config.heads, config.inner // config.heads, like
        return [self.new_cache(layouts[kind], *shape) for kind in config.kinds]

    def new_layer(self, config: ExternalConfig) -> nn.Module:
        """A layer."""
        return Layer(config)

    def new_cache(self, *arguments) -> KVCache:
        """The empty cache of a layer, by `KVCache`'s arguments."""
        return KVCache(*arguments)

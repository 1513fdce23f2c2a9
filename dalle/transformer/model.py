"""The sparse transformer, stage two (paper section 2.2, appendix B.1).

A decoder over text_len text slots and rows x columns image slots. It sees ids and knows no image
tokenizer. Every layer is attention of one kind (dalle/masks.py) and an MLP, pre-norm.

    B batch, T text_len, N all slots, n slots of this call, D width, V joint vocabulary
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle.layout import TokenLayout
from dalle.masks import layer_kinds, visible
from dalle.nn.attention import CHOICES, build_mask, resolve_backend
from dalle.nn.blocks import FP32LayerNorm, ResidualBlock, TransformerBlock
from dalle.nn.int8 import int8_linear, weight_like
from dalle.nn.kv_cache import KVCache, KVCacheLayout
from dalle.nn.sparse_mask import SparseMask
from dalle.types import check_tokens


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the transformer; the defaults are the paper's 12 billion."""

    depth: int = 64
    """Attention layers; each is followed by an MLP (2.2)."""
    heads: int = 62
    """Attention heads (2.2)."""
    head_dim: int = 64
    """Width of a head (2.2); the model is heads * head_dim = 3968 wide."""
    text_len: int = 256
    """Text slots, start-of-text among them (2.2)."""
    grid: tuple[int, int] = (32, 32)
    """Rows and columns of image tokens (2.1)."""
    text_vocab: int = 16384
    """Text ids without the pads (2.2)."""
    image_vocab: int = 8192
    """Codes of the image tokenizer (2.1)."""
    conv_kernel: int = 11
    """Side of the convolutional mask of the last layer (2.2)."""
    sparse: bool = True
    """Row, column and conv layers (2.2); false makes every layer causal."""
    full_attention_every: int | None = None
    """Every so many layers one is causal instead, counted from 1; not in the paper, which has none."""
    init_scale: float = 0.125
    """Weights start as N(0, init_scale / sqrt(inputs)) (Child et al.)."""
    backend: str = "auto"
    """How attention is computed: dense, sdpa, blocks, flex, or auto: by device (dalle/nn/attention.py)."""
    activation_checkpointing: bool = False
    """Keep only the trunk; the inside of each resblock is computed again in the backward pass (2.4)."""

    def __post_init__(self):
        for name in ("depth", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.full_attention_every is not None and self.full_attention_every < 1:
            raise ValueError(
                f"full_attention_every must be positive, or null for none, got {self.full_attention_every}"
            )
        if self.backend not in CHOICES:
            raise ValueError(f"unknown backend {self.backend!r}; expected one of {', '.join(CHOICES)}")
        if self.sparse:
            visible(
                "conv", TokenLayout(2, self.grid, 1, 1), self.conv_kernel
            )  # refuses a kernel that cannot be

    @property
    def width(self) -> int:
        """D."""
        return self.heads * self.head_dim

    @property
    def layout(self) -> TokenLayout:
        """Lengths and offsets of the stream."""
        return TokenLayout(self.text_len, self.grid, self.text_vocab, self.image_vocab)

    @property
    def kinds(self) -> list[str]:
        """Attention kind of each layer."""
        kinds = layer_kinds(self.depth) if self.sparse else ["causal"] * self.depth
        return [
            "causal" if self.full_attention_every and i % self.full_attention_every == 0 else k
            for i, k in enumerate(kinds, 1)
        ]


class Transformer(nn.Module):
    """Joint ids -> logits. `hidden` is the trunk; `text_logits` and `image_logits` are its heads."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.layout = layout = config.layout
        self.token_embedding = nn.Embedding(layout.embedding_size, config.width)
        self.text_position = nn.Embedding(layout.text_len, config.width)
        self.row = nn.Embedding(layout.rows, config.width)
        self.column = nn.Embedding(layout.columns, config.width)
        self.layers = nn.ModuleList(
            TransformerBlock(config.width, config.heads, config.activation_checkpointing)
            for _ in range(config.depth)
        )
        self.final_norm = FP32LayerNorm(config.width)
        self.to_logits = nn.Linear(config.width, layout.vocab, bias=False)
        self.patterns = {
            kind: SparseMask(kind, layout, config.conv_kernel) for kind in sorted(set(config.kinds))
        }
        self.register_buffer("allowed_text", layout.allowed_text(), persistent=False)
        init_weights(self)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every position: joint ids (B, n) -> fp32 (B, n, V); logits[:, p] predicts ids[:, p].

        Tokens that cannot stand at a position (the other modality, another position's pad) have -inf.
        """
        hidden = self.hidden(ids)
        text, image = hidden[:, : self.layout.text_len], hidden[:, self.layout.text_len :]
        logits = hidden.new_full((*hidden.shape[:2], self.layout.vocab), -torch.inf)
        slots = torch.arange(text.shape[1], device=ids.device)
        logits[:, : text.shape[1], : self.layout.image_offset] = self.text_logits(text, slots)
        logits[:, text.shape[1] :, self.layout.image_offset :] = self.image_logits(image)
        return logits

    def hidden(self, ids: Tensor) -> Tensor:
        """Joint ids (B, n) -> final states (B, n, D); state p reads ids before p.

        Raises:
            ValueError: an id that cannot stand where it stands. Only ids on the CPU are checked; those of
                another device were when `TokenLayout.pack` made them.
        """
        if ids.device.type == "cpu":
            text, image = self.layout.unpack(ids)
            check_tokens(text, self.layout.image_offset, "text ids")
            check_tokens(image, self.layout.image_vocab, "image ids less their offset")
        return self.prefill(self.layout.shift(ids)[:, : ids.shape[1]])

    def prefill(self, inputs: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Input ids (B, n) of the first n slots -> final states (B, n, D); `caches` take what `step` needs."""
        x = self.embed(inputs)
        backends = self.backends(inputs.shape[1])
        for kind, backend in backends.items():
            build_mask(backend, self.patterns[kind], x.device)
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.kinds, strict=True)):
            x = layer(x, self.patterns[kind], backends[kind], caches[i] if caches else None)
        return self.final_norm(x)

    def decode_step(self, tokens: Tensor, slot: int | Tensor, caches: list[KVCache]) -> Tensor:
        """Reads one image token of every stream, in sampling.

        Args:
            tokens: int64 (B,), those of image slot `slot - 1`.
            slot: the image slot that reads them, at least 1; an int or a tensor (1,), see `KVCache.attend`.
            caches: hold the slots before it, and take this one.

        Returns:
            (B, D), the state that predicts the token of the slot.
        """
        row, column = slot // self.layout.columns, slot % self.layout.columns
        x = self.token_embedding(tokens + self.layout.image_offset) + (
            self.row.weight[row] + self.column.weight[column]
        )
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.step(x, cache, slot)
        return self.final_norm(x)

    def backends(self, slots: int | None = None) -> dict[str, str]:
        """What computes the attention of each kind, on the model's device, for a call of so many slots.

        Raises:
            ValueError: the device cannot run the backend that the configuration names.
        """
        c, device, slots = self.config, weight_like(self.to_logits).device, slots or self.layout.seq_len
        return {
            kind: resolve_backend(c.backend, p, slots, device, c.head_dim)
            for kind, p in self.patterns.items()
        }

    def embed(self, inputs: Tensor) -> Tensor:
        """Token plus position: text slots have one embedding each, image slots row + column.

        Slots that read a pad have no position beside it: each pad is its position's own (Figure 10).
        """
        return self.token_embedding(inputs) + self._position(inputs)

    def _position(self, inputs: Tensor) -> Tensor:
        slots = torch.arange(inputs.shape[1], device=inputs.device)
        text, image = slots[: self.layout.text_len], slots[self.layout.text_len :] - self.layout.text_len
        is_pad = (inputs >= self.layout.text_vocab) & (inputs < self.layout.image_offset)
        at_text = self.text_position(text) * ~is_pad[:, : len(text), None]
        at_image = self.row(image // self.layout.columns) + self.column(image % self.layout.columns)
        return torch.cat([at_text, at_image.expand(len(inputs), -1, -1)], dim=1)

    def text_logits(self, hidden: Tensor, slots: Tensor) -> Tensor:
        """States (..., D) of text slots (...) -> fp32 (..., text_vocab + T)."""
        logits = self._logits(hidden, slice(self.layout.image_offset))
        return logits.masked_fill(~self.allowed_text[slots], -torch.inf)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """States (..., D) of image slots -> fp32 (..., image_vocab)."""
        return self._logits(hidden, slice(self.layout.image_offset, None))

    def _logits(self, hidden: Tensor, ids: slice) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # B.2: logits in fp32
            return int8_linear(hidden.float(), self.to_logits, ids)

    def resblocks(self) -> list[ResidualBlock]:
        """The 2 * depth resblocks in order (2.4: each has a gradient scale of its own)."""
        return [block for layer in self.layers for block in (layer.attention, layer.mlp)]

    def fsdp_groups(self) -> list[list[nn.Module]]:
        """What sharded training gathers at once, in order of use: all in it is computed in 16 bit under autocast."""
        return [[layer.attention.f, layer.mlp.f] for layer in self.layers]

    def init_kv_caches(self, captions: int, candidates: int) -> list[KVCache]:
        """Empty caches, one a layer, for candidates of each caption, in the number format of the matrices."""
        c, like = self.config, weight_like(self.layers[0].attention.f.qkv)
        places = {
            kind: KVCacheLayout(kind, self.layout, c.conv_kernel).to(like.device) for kind in self.patterns
        }
        return [KVCache(places[kind], captions, candidates, c.heads, c.head_dim, like) for kind in c.kinds]


def init_weights(model: Transformer) -> None:
    """Child et al. (2019): the loss starts at ln(vocabulary), residual paths start small.

    Weights N(0, s / sqrt(inputs)) with s = init_scale, the last matrix of each resblock smaller by
    sqrt(2 depth), token embeddings N(0, s / sqrt(D)), position embeddings N(0, s / sqrt(D n)) where n
    are summed, biases and the output matrix 0.
    """
    config = model.config
    scale = config.init_scale
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            last = name.endswith((".out", ".project"))
            gain = scale / math.sqrt(2 * config.depth) if last else scale
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.token_embedding.weight, std=scale / math.sqrt(config.width))
    nn.init.normal_(model.text_position.weight, std=scale / math.sqrt(config.width))
    for position in (model.row, model.column):
        nn.init.normal_(position.weight, std=scale / math.sqrt(2 * config.width))
    nn.init.zeros_(model.to_logits.weight)

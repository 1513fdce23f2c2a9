"""The sparse transformer, stage two (paper section 2.2, appendix B.1).

A decoder over text_len text positions and rows x columns image positions. It sees ids and knows no image
tokenizer. Every layer is attention of one kind (dalle/masks.py) and an MLP, pre-norm.

    B batch, T text_len, N all positions, n positions of this call, D width, V joint vocabulary
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.layout import check_tokens
from dalle.nn.attention import SparseMask, build_mask, resolve_backend
from dalle.nn.blocks import FP32LayerNorm, ResidualBlock, TransformerBlock
from dalle.nn.int8 import int8_linear
from dalle.nn.kv_cache import KVCache, KVCacheLayout, positions_in
from dalle.transformer.config import TransformerConfig


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
            TransformerBlock(config.width, config.heads, config.activation_checkpointing, config.qk_norm)
            for _ in range(config.depth)
        )
        self.final_norm = FP32LayerNorm(config.width)
        self.to_logits = nn.Linear(config.width, layout.vocab, bias=False)
        self.patterns = {
            kind: SparseMask(kind, layout, config.conv_kernel) for kind in sorted(set(config.kinds))
        }
        init_weights(self)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every position: joint ids (B, n) -> fp32 (B, n, V); logits[:, p] predicts ids[:, p].

        Tokens that cannot stand at a position (the other modality, another position's pad) have -inf.
        """
        hidden = self.hidden(ids)
        text, image = hidden[:, : self.layout.text_len], hidden[:, self.layout.text_len :]
        logits = hidden.new_full((*hidden.shape[:2], self.layout.vocab), -torch.inf)
        positions = torch.arange(text.shape[1], device=ids.device)
        logits[:, : text.shape[1], : self.layout.image_offset] = self.text_logits(text, positions)
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
        """Input ids (B, n) -> final states (B, n, D); `caches` are filled for `step`."""
        x = self.embed(inputs)
        backends = self.backends(inputs.shape[1])
        for kind, backend in backends.items():
            build_mask(backend, self.patterns[kind], x.device)
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.kinds, strict=True)):
            if caches:  # a compiled layer would be compiled again for each number of captions
                x = layer.forward(x, self.patterns[kind], backends[kind], caches[i])
            else:
                x = layer(x, self.patterns[kind], backends[kind])
        return self.final_norm(x)

    def decode_step(self, tokens: Tensor, position: int | Tensor, caches: list[KVCache]) -> Tensor:
        """Reads one image token of every sequence, in sampling.

        Args:
            tokens: int64 (B,), those of image position `position - 1`.
            position: the image position that reads them, at least 1; an int or a tensor (1,), see
                `KVCacheLayout.at`.
            caches: hold the positions before it, and take this one.

        Returns:
            (B, D), the state that predicts the token of the position.
        """
        row, column = position // self.layout.columns, position % self.layout.columns
        x = self.token_embedding(tokens + self.layout.image_offset) + (
            self.row.weight[row] + self.column.weight[column]
        )
        at = positions_in(caches, position)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.step(x, cache, at[cache.layout])
        return self.final_norm(x)

    def backends(self, positions: int | None = None) -> dict[str, str]:
        """Attention backend of each kind on the model's device, for a number of positions.

        Raises:
            ValueError: the device cannot run the backend that the configuration names.
        """
        c, device, positions = self.config, self.to_logits.weight.device, positions or self.layout.seq_len
        return {
            kind: resolve_backend(c.attention_backend, p, positions, device, c.head_dim)
            for kind, p in self.patterns.items()
        }

    def embed(self, inputs: Tensor) -> Tensor:
        """Token plus position: text positions have one embedding each, image positions row + column.

        Positions that read a pad have no position embedding: each pad is its position's own (Figure 10).
        """
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        text, image = (
            positions[: self.layout.text_len],
            positions[self.layout.text_len :] - self.layout.text_len,
        )
        is_pad = (inputs >= self.layout.text_vocab) & (inputs < self.layout.image_offset)
        at_text = self.text_position(text) * ~is_pad[:, : len(text), None]
        at_image = self.row(image // self.layout.columns) + self.column(image % self.layout.columns)
        position = torch.cat([at_text, at_image.expand(len(inputs), -1, -1)], dim=1)
        return self.token_embedding(inputs) + position

    def text_logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """States (..., D) of text positions (...) -> fp32 (..., text_vocab + T), -inf for others' pads."""
        return self.hide_pads(self._logits(hidden, slice(self.layout.image_offset)), positions)

    def hide_pads(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Text logits (..., text_vocab + T) of positions (...); -inf for others' pads, in place."""
        others = torch.arange(self.layout.text_len, device=logits.device) != positions[..., None]
        logits[..., self.layout.text_vocab :].masked_fill_(others, -torch.inf)
        return logits

    def image_logits(self, hidden: Tensor) -> Tensor:
        """States (..., D) of image positions -> fp32 (..., image_vocab)."""
        return self._logits(hidden, slice(self.layout.image_offset, None))

    def _logits(self, hidden: Tensor, ids: slice) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # B.2: logits in fp32
            if isinstance(self.to_logits, nn.Linear):
                return F.linear(hidden.float(), self.to_logits.weight[ids].float())
            return int8_linear(hidden.float(), self.to_logits, ids)

    def resblocks(self) -> list[ResidualBlock]:
        """The 2 * depth resblocks in order (2.4: each has a gradient scale of its own)."""
        return [block for layer in self.layers for block in (layer.attention, layer.mlp)]

    def fsdp_groups(self) -> list[list[nn.Module]]:
        """Groups that sharded training gathers at once, in order; computed in 16 bit under autocast.

        Norms, also those of queries and keys, are in none, and stay in fp32.
        """
        if self.config.qk_norm:
            return [[layer.attention.f.qkv, layer.attention.f.out, layer.mlp.f] for layer in self.layers]
        return [[layer.attention.f, layer.mlp.f] for layer in self.layers]

    def init_kv_caches(
        self, captions: int, candidates: int, device: torch.device | str | None = None
    ) -> list[KVCache]:
        """Empty caches, one a layer, for candidates of each caption, in the number format of the matrices.

        They are on the model's device unless another one is given.
        """
        c, like = self.config, self.layers[0].attention.f.qkv.weight
        like = like.new_empty(0, device=device)
        layouts = {
            kind: KVCacheLayout.of_kind(kind, self.layout, c.conv_kernel, like.device)
            for kind in self.patterns
        }
        return [KVCache(layouts[kind], captions, candidates, c.heads, c.head_dim, like) for kind in c.kinds]


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

"""The transformer of DALLE-pytorch (lucidrains, 1.6.6), to draw with; its blocks, masks and shifts as they are there.

Beside ours: a learned scale on each path, GEGLU, a quarter of each state taken from the token above and a quarter
from the left (half from the left in text), rotated queries, keys and values, row and column masks that end at the
own row or column, a mask of 5 x 5, and two trunks where it is "reversible".

    B batch, n slots of this call, T text_len, N image tokens, D width, V joint vocabulary
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle.nn.blocks import FP32LayerNorm
from dalle.nn.int8 import weight_like
from dalle.nn.kv_cache import KVCache, scale_query
from dalle.pretrained.dalle_pytorch.masks import DallePytorchConfig, Memory, image_sees, rotate, shifted
from dalle.pretrained.external_transformer import ForeignPlaces, ForeignTransformer, stream_mask

Trunks = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head self-attention; values are rotated too."""

    def __init__(self, config: DallePytorchConfig):
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.width)

    def forward(self, x: Tensor, mask: Tensor, angles: Tensor | None, memory: Memory | None) -> Tensor:
        """x (B, n, D) of the first n slots."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if angles is not None:
            q, k, v = (rotate(part, angles) for part in (q, k, v))
        if memory is not None:
            memory.cache.fill(k, v, memory.text_slots)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))

    def step(self, x: Tensor, cache: KVCache, angles: Tensor | None, position: int | Tensor) -> Tensor:
        """x (B, D) of one image token of every stream."""
        shape = {"c": cache.captions, "h": self.heads, "three": 3}
        q, k, v = rearrange(self.qkv(x), "(c n) (three h d) -> three (c h) n d", **shape)
        if angles is not None:
            q, k, v = (rotate(part, angles) for part in (q, k, v))
        mixed = cache.attend(scale_query(q), k, v, position)
        return self.out(rearrange(mixed, "(c h) n d -> (c n) (h d)", h=self.heads))


class MLP(nn.Module):
    """D -> 4 D -> D with GEGLU: value * GELU(gate)."""

    def __init__(self, config: DallePytorchConfig):
        super().__init__()
        self.expand = nn.Linear(config.width, 8 * config.width)
        self.project = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=-1)
        return self.project(value * F.gelu(gate))

    def step(self, x: Tensor) -> Tensor:
        """The same for x (B, D)."""
        return self(x)


class Path(nn.Module):
    """What is added to the trunk: scale * f(shifted norm(x)), perhaps normed again; `ring` is its place in Memory."""

    def __init__(self, config: DallePytorchConfig, f: nn.Module, ring: int):
        super().__init__()
        self.norm, self.f, self.ring = FP32LayerNorm(config.width), f, ring
        self.norm_out = FP32LayerNorm(config.width) if config.sandwich else nn.Identity()
        self.scale = nn.Parameter(torch.ones(1, 1, config.width))
        self.columns = config.grid[1] if config.shift else None
        self.text_slots = config.layout.text_slots

    def forward(self, x: Tensor, memory: Memory | None, *rest) -> Tensor:
        """x (B, n, D) of the first n slots, and what f takes besides."""
        x = self.norm(x)
        if memory is not None:
            memory.fill(self.ring, x[:, self.text_slots :])
        if self.columns:
            x = shifted(x, self.text_slots, self.columns)
        return self.norm_out(self.f(x, *rest)) * self.scale

    def step(self, x: Tensor, memory: Memory, at: Tensor, dtype: torch.dtype, *rest) -> Tensor:
        """x (B, D) of the image token number `at` (1,); f computes in `dtype`."""
        x = self.norm(x)
        if self.columns:
            x = memory.shifted(self.ring, x, at)
        return self.norm_out(self.f.step(x.to(dtype), *rest)) * self.scale[0]


class Layer(nn.Module):
    """Attention, then MLP, on one trunk or on two."""

    def __init__(self, config: DallePytorchConfig):
        super().__init__()
        self.attention, self.mlp = Path(config, Attention(config), 0), Path(config, MLP(config), 1)
        self.reversible = config.reversible

    def forward(self, trunks: Trunks, mask: Tensor, angles: Tensor | None, memory: Memory | None) -> Trunks:
        """Both trunks (B, n, D)."""
        first = trunks[0] + self.attention(trunks[1], memory, mask, angles, memory)
        return self._after(first, trunks[1], self.mlp(first, memory))

    def step(
        self, trunks: Trunks, memory: Memory, angles: Tensor | None, position: int | Tensor, at: Tensor
    ) -> Trunks:
        """Both trunks (B, D) of one image token of every stream."""
        dtype = weight_like(self.attention.f.qkv).dtype
        first = trunks[0] + self.attention.step(trunks[1], memory, at, dtype, memory.cache, angles, position)
        return self._after(first, trunks[1], self.mlp.step(first, memory, at, dtype))

    def _after(self, first: Tensor, second: Tensor, added: Tensor) -> Trunks:
        return (first, second + added) if self.reversible else (first + added,) * 2


class DallePytorch(ForeignTransformer):
    """The package's DALLE, without the image tokenizer in it."""

    def __init__(self, config: DallePytorchConfig):
        super().__init__(config)
        layout, width = self.layout, config.width
        if not config.shared:
            self.text_embedding = nn.Embedding(layout.image_offset, width)
            self.image_embedding = nn.Embedding(layout.image_vocab, width)
        if config.rotary:
            self.register_buffer("angles", torch.zeros(1, layout.seq_len + 1, config.rotary))
        else:
            self.text_position = nn.Embedding(layout.text_slots, width)
            self.image_position = nn.ParameterList(
                [torch.zeros(1, layout.rows, 1, width), torch.zeros(1, 1, layout.columns, width)]
            )
        self.layers = nn.ModuleList(Layer(config) for _ in config.kinds)
        self.final_norm = FP32LayerNorm(width)
        self.to_logits = nn.Linear(width, layout.vocab)
        with torch.device("cpu"):  # no part of a file, so they must have values when the rest is made without
            self.sees = {kind: image_sees(kind, layout.rows) for kind in sorted(set(config.kinds))}

    def prefill(self, inputs: Tensor, caches: list[Memory] | None = None) -> Tensor:
        """Input ids (B, n) of the first n slots -> final states (B, n, D); `caches` take what `step` needs."""
        n, slots = inputs.shape[1], self.layout.text_slots
        x = self.embed(inputs)
        angles = self.angles[0, :n] if self.config.rotary else None
        masks = {kind: stream_mask(sees, slots)[:n, :n].to(x.device) for kind, sees in self.sees.items()}
        trunks = (x, x)
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.kinds, strict=True)):
            trunks = layer(trunks, masks[kind], angles, caches[i] if caches else None)
        return self._final(trunks)

    def decode_step(self, tokens: Tensor, slot: int | Tensor, caches: list[Memory]) -> Tensor:
        """Reads image tokens (B,) of image slot `slot - 1` -> states (B, D) that predict those of the slot."""
        position = slot - 1  # of the token that is read
        at = torch.tensor([position], device=tokens.device) if isinstance(position, int) else position
        x = self._embed_image(tokens[:, None], at)[:, 0]
        angles = self.angles[0].index_select(0, self.layout.text_slots + at) if self.config.rotary else None
        trunks = (x, x)
        for layer, memory in zip(self.layers, caches, strict=True):
            trunks = layer.step(trunks, memory, angles, position, at)
        return self._final(trunks)

    def _final(self, trunks: Trunks) -> Tensor:
        x = sum(trunks) / 2 if self.config.reversible else trunks[0]
        return self.final_norm(x / x.amax(dim=-1, keepdim=True) if self.config.stable else x)

    def embed(self, inputs: Tensor) -> Tensor:
        """Token plus learned position, if there are any."""
        slots, offset = self.layout.text_slots, self.layout.image_offset
        text, image = inputs[:, :slots], inputs[:, slots:] - offset
        weight = self.to_logits.weight[:offset] if self.config.shared else self.text_embedding.weight
        x = F.embedding(text, weight)
        if not self.config.rotary:
            x = x + self.text_position.weight[: text.shape[1]]
        return torch.cat([x, self._embed_image(image, torch.arange(image.shape[1], device=x.device))], dim=1)

    def _embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Image tokens (B, p) that stand at positions (p,) of the image."""
        offset, columns = self.layout.image_offset, self.layout.columns
        x = F.embedding(
            tokens, self.to_logits.weight[offset:] if self.config.shared else self.image_embedding.weight
        )
        if self.config.rotary:
            return x
        rows, beside = (part.flatten(0, 2) for part in self.image_position)
        return x + rows[positions // columns] + beside[positions % columns]

    def text_logits(self, hidden: Tensor, slots: Tensor | None = None) -> Tensor:
        """States (..., D) of text slots -> fp32 (..., text_vocab + T), every pad everywhere."""
        return self._logits(hidden, slice(None, self.layout.image_offset))

    def image_logits(self, hidden: Tensor) -> Tensor:
        """States (..., D) of image slots -> fp32 (..., image_vocab)."""
        return self._logits(hidden, slice(self.layout.image_offset, None))

    def _logits(self, hidden: Tensor, part: slice) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(
                hidden.float(), self.to_logits.weight[part].float(), self.to_logits.bias[part].float()
            )

    def init_kv_caches(self, captions: int, candidates: int) -> list[Memory]:
        """Empty memories, one a layer, for candidates of each caption, in the number format of the matrices."""
        c, like = self.config, weight_like(self.layers[0].attention.f.qkv)
        places = {kind: ForeignPlaces(sees).to(like.device) for kind, sees in self.sees.items()}
        caches = [KVCache(places[kind], captions, candidates, c.heads, c.head_dim, like) for kind in c.kinds]
        return [Memory(cache, c, like.device) for cache in caches]

    def kv_bytes_per_sample(self) -> int:
        """Memory that drawing keeps of one candidate."""
        c, itemsize = self.config, weight_like(self.layers[0].attention.f.qkv).itemsize
        keys = 2 * self.layout.num_image_tokens * c.heads * c.head_dim * itemsize
        return len(c.kinds) * (keys + 4 * c.width * c.grid[1] * c.shift)

"""Blocks of minDALL-E and ruDALL-E, and how both read a stream: pre-norm attention and MLP, each layer under a table.

Beside ours: the package's own GELU, q, k and v from one matrix or from three, a norm behind each path too where it
is a sandwich (CogView), and a bound on what attention gives.

    B batch, n slots of this call, T text_len, N image tokens, D width, d width of a head
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle.nn.blocks import FP32LayerNorm
from dalle.nn.int8 import weight_like
from dalle.nn.kv_cache import KVCache, scale_query
from dalle.pretrained.external_transformer import ForeignPlaces, ForeignTransformer, stream_mask

GELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": F.gelu,
    "tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class BlockConfig:
    """Shape of a layer."""

    width: int
    """D."""
    heads: int
    """Attention heads; D / heads is d."""
    gelu: str
    """One of GELUS."""
    matrices: int = 1
    """q, k and v come from one matrix, or from 3."""
    attention_bias: bool = True
    """Of every matrix of attention."""
    mlp_bias: bool = True
    """Of both matrices of the MLP."""
    sandwich: bool = False
    """A norm after each path too."""
    bound: float | None = None
    """What attention gives is cut to at most this, and at least the negative."""

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        width, bias = config.width, config.attention_bias
        self.heads, self.bound = config.heads, config.bound
        self.qkv = nn.ModuleList(
            nn.Linear(width, 3 * width // config.matrices, bias) for _ in range(config.matrices)
        )
        self.out = nn.Linear(width, width, bias)

    def forward(self, x: Tensor, mask: Tensor, seen: int, cache: KVCache | None) -> Tensor:
        """x (B, n, D) of the first n slots under mask (n, n); a cache takes the first `seen` as text."""
        q, k, v = rearrange(self._project(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if cache is not None:
            cache.fill(k, v, seen)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self._bounded(self.out(rearrange(mixed, "b h n d -> b n (h d)")))

    def step(self, x: Tensor, cache: KVCache, place: int | Tensor) -> Tensor:
        """x (B, D) of one image token of every stream."""
        shape = {"c": cache.captions, "h": self.heads, "three": 3}
        q, k, v = rearrange(self._project(x), "(c n) (three h d) -> three (c h) n d", **shape)
        mixed = cache.attend(scale_query(q), k, v, place)
        return self._bounded(self.out(rearrange(mixed, "(c h) n d -> (c n) (h d)", h=self.heads)))

    def _project(self, x: Tensor) -> Tensor:
        parts = [matrix(x) for matrix in self.qkv]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _bounded(self, x: Tensor) -> Tensor:
        return x if self.bound is None else x.clamp(-self.bound, self.bound)


class MLP(nn.Module):
    """D -> 4 D -> D."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.expand = nn.Linear(config.width, 4 * config.width, config.mlp_bias)
        self.project = nn.Linear(4 * config.width, config.width, config.mlp_bias)
        self.gelu = GELUS[config.gelu]

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.gelu(self.expand(x)))


class Path(nn.Module):
    """What is added to the trunk: f(norm(x)), perhaps normed again."""

    def __init__(self, config: BlockConfig, f: nn.Module):
        super().__init__()
        self.norm, self.f = FP32LayerNorm(config.width), f
        self.norm_out = FP32LayerNorm(config.width) if config.sandwich else nn.Identity()

    def forward(self, x: Tensor, *rest) -> Tensor:
        """x (B, n, D), and what f takes besides."""
        return self.norm_out(self.f(self.norm(x), *rest))


class Layer(nn.Module):
    """Attention, then MLP; the trunk stays fp32."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.attention, self.mlp = Path(config, Attention(config)), Path(config, MLP(config))

    def forward(self, x: Tensor, mask: Tensor, seen: int, cache: KVCache | None) -> Tensor:
        """See `Attention.forward`."""
        x = x + self.attention(x, mask, seen, cache)
        return x + self.mlp(x)

    def step(self, x: Tensor, cache: KVCache, place: int | Tensor) -> Tensor:
        """One image token of every stream (B, D), computed in the number format of the matrices."""
        attention, mlp = self.attention, self.mlp
        dtype = weight_like(mlp.f.expand).dtype
        x = x + attention.norm_out(attention.f.step(attention.norm(x).to(dtype), cache, place))
        return x + mlp.norm_out(mlp.f(mlp.norm(x).to(dtype)))


class PlainTransformer(ForeignTransformer, ABC):
    """Reads a stream through such layers; a subclass embeds and makes logits.

    Args:
        config: with `layout` and `blocks`.
        kinds: kind of each layer.
        sees: by kind, bool (N, N): which image slot sees which.
        seen: the first so many slots that every layer sees; image slots are counted from there.
    """

    def __init__(self, config, kinds: tuple[str, ...], sees: dict[str, Tensor], seen: int):
        super().__init__(config)
        self.kinds, self.sees, self.seen = kinds, sees, seen
        self.layers = nn.ModuleList(Layer(config.blocks) for _ in kinds)

    @abstractmethod
    def embed_text(self, text: Tensor) -> Tensor:
        """Input ids (B, t) of the first text slots -> (B, t, D)."""

    @abstractmethod
    def embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Image tokens (B, p) that stand at positions (p,) of the image -> (B, p, D)."""

    @abstractmethod
    def final(self, x: Tensor) -> Tensor:
        """What leaves the layers -> final states."""

    def prefill(self, inputs: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Input ids (B, n) of the first n slots -> final states (B, n, D); `caches` take what `step` needs."""
        n, slots = inputs.shape[1], self.layout.text_slots
        text, image = inputs[:, :slots], inputs[:, slots:] - self.layout.image_offset
        positions = torch.arange(image.shape[1], device=inputs.device)
        x = torch.cat([self.embed_text(text), self.embed_image(image, positions)], dim=1)
        masks = {kind: stream_mask(sees, self.seen)[:n, :n].to(x.device) for kind, sees in self.sees.items()}
        for i, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True)):
            x = layer(x, masks[kind], self.seen, caches[i] if caches else None)
        return self.final(x)

    def decode_step(self, tokens: Tensor, slot: int | Tensor, caches: list[KVCache]) -> Tensor:
        """Reads image tokens (B,) of image slot `slot - 1` -> states (B, D) that predict those of the slot."""
        position = slot - 1  # of the token that is read
        place = position + self.layout.text_slots - self.seen
        at = torch.tensor([position], device=tokens.device) if isinstance(position, int) else position
        x = self.embed_image(tokens[:, None], at)[:, 0]
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.step(x, cache, place)
        return self.final(x)

    def init_kv_caches(self, captions: int, candidates: int) -> list[KVCache]:
        """Empty caches, one a layer, for candidates of each caption, in the number format of the matrices."""
        blocks, like = self.config.blocks, weight_like(self.layers[0].attention.f.out)
        places = {kind: ForeignPlaces(sees).to(like.device) for kind, sees in self.sees.items()}
        shape = captions, candidates, blocks.heads, blocks.width // blocks.heads, like
        return [KVCache(places[kind], *shape) for kind in self.kinds]

    def kv_bytes_per_sample(self) -> int:
        """Memory that drawing keeps of one candidate."""
        itemsize = weight_like(self.layers[0].attention.f.out).itemsize
        return 2 * len(self.kinds) * self.layout.num_image_tokens * self.config.blocks.width * itemsize


def fp32_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """States (..., D) by rows (K, D) of an output matrix -> fp32 (..., K), under any autocast."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())

"""Transformer blocks of DALLE-pytorch, minDALL-E and ruDALL-E, with our residual blocks and KV cache.

Options against ours: another GELU or GEGLU, other biases, rotary positions, a norm after each residual branch
too (the sandwich of CogView), clamped attention outputs.

    B batch, n inputs of this call, D width, d head_dim
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle.config import configuration
from dalle.nn.blocks import FP32LayerNorm, ResidualBlock
from dalle.nn.kv_cache import CachePosition, KVCache

GELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": F.gelu,
    "tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
}


@configuration(kw_only=True)
class BlockConfig:
    """Shape of a layer."""

    width: int
    heads: int
    head_dim: int | None = None  # d; D / heads unless given
    gelu: str = "exact"  # one of GELUS
    gated: bool = False  # GEGLU in the MLP: value * GELU(gate)
    qkv_matrices: int = 1  # q, k and v from one matrix, or from 3
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    sandwich: bool = False  # a norm after each residual branch too
    max_attention: float | None = None  # attention outputs are clamped to this magnitude

    def __post_init__(self):
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")

    @property
    def inner(self) -> int:
        """Width of all heads."""
        return self.heads * (self.head_dim or self.width // self.heads)


class Projections(nn.ModuleList):
    """q, k and v side by side, from one matrix or from three."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([matrix(x) for matrix in self], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention; rotary angles, where there are any, rotate the values too."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.heads, limit = config.heads, config.max_attention
        columns = 3 * config.inner // config.qkv_matrices
        matrices = (nn.Linear(config.width, columns, config.qkv_bias) for _ in range(config.qkv_matrices))
        self.qkv = Projections(matrices)
        self.out = nn.Linear(config.inner, config.width, config.out_bias)
        self.clamp = nn.Hardtanh(-limit, limit) if limit else nn.Identity()

    def forward(
        self, x: Tensor, mask: Tensor, prefix_len: int, cache: KVCache | None, angles: Tensor | None
    ) -> Tensor:
        """x (B, n, D) of the first inputs, mask (n, n); a cache stores the first `prefix_len` as text."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k, v = (rotate(part, angles) for part in (q, k, v))
        if cache is not None:
            cache.prefill(k, v, prefix_len)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.clamp(self.out(rearrange(mixed, "b h n d -> b n (h d)")))

    def step(self, x: Tensor, cache: KVCache, at: CachePosition, angles: Tensor | None) -> Tensor:
        """x (B, D) of one image token of every candidate."""
        shape = {"c": cache.captions, "h": self.heads, "three": 3}
        qkv = rearrange(self.qkv(x), "(c n) (three h d) -> three (c h) n d", **shape)
        mixed = cache.attend(rotate(qkv, angles), at)
        return self.clamp(self.out(rearrange(mixed, "(c h) n d -> (c n) (h d)", h=self.heads)))


def rotate(x: Tensor, angles: Tensor | None) -> Tensor:
    """Rotates the first r numbers of x (..., n, d), in pairs, by angles (n, r)."""
    if angles is None:
        return x
    rotated, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    one, other = rotated.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-other, one], dim=-1).flatten(-2)
    return torch.cat([(rotated * angles.cos() + across * angles.sin()).to(x.dtype), rest], dim=-1)


class MLP(nn.Module):
    """D -> 4 D -> D."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.expand = nn.Linear(config.width, (8 if config.gated else 4) * config.width, config.mlp_bias)
        self.project = nn.Linear(4 * config.width, config.width, config.mlp_bias)
        self.gelu, self.gated = GELUS[config.gelu], config.gated

    def forward(self, x: Tensor, *rest) -> Tensor:
        """x (..., D); the other arguments are for attention."""
        if self.gated:
            value, gate = self.expand(x).chunk(2, dim=-1)
            return self.project(value * self.gelu(gate))
        return self.project(self.gelu(self.expand(x)))

    step = forward


class SandwichBlock(ResidualBlock):
    """The residual branch f(norm(x)), in a sandwich normed again."""

    def __init__(self, config: BlockConfig, f: nn.Module):
        super().__init__(config.width, f)
        self.norm_out = FP32LayerNorm(config.width) if config.sandwich else nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the matrices."""
        return (self.f.project if isinstance(self.f, MLP) else self.f.out).weight.dtype

    def forward(self, x: Tensor, *rest) -> Tensor:
        """x (B, n, D) and the other arguments of f."""
        return self.norm_out(super().forward(x, *rest))

    def step(self, x: Tensor, *rest) -> Tensor:
        """x (B, D) of one image token and the other arguments of f.step."""
        return self.norm_out(self.f.step(self.norm(x).to(self.dtype), *rest))


class Layer(nn.Module):
    """Attention, then MLP; the trunk stays fp32."""

    def __init__(self, config: BlockConfig, block_class: type[SandwichBlock] = SandwichBlock):
        super().__init__()
        self.attention = block_class(config, Attention(config))
        self.mlp = block_class(config, MLP(config))

    def forward(self, x: Tensor, *rest) -> Tensor:
        """x (B, n, D) and the other arguments of `Attention.forward`."""
        x = x + self.attention(x, *rest)
        return x + self.mlp(x, *rest)

    def step(self, x: Tensor, *rest) -> Tensor:
        """x (B, D) and the other arguments of `Attention.step`."""
        x = x + self.attention.step(x, *rest)
        return x + self.mlp.step(x, *rest)

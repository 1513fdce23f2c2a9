"""Pre-norm blocks of DALLE-pytorch, minDALL-E and ruDALL-E, under a table of what each position sees.

Against ours: another GELU or GEGLU, other biases, rotary positions, a norm after each path too (the sandwich
of CogView), bounded attention.

    B batch, n inputs of this call, D width, d width of a head
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle.nn.blocks import FP32LayerNorm, ResidualBlock
from dalle.nn.kv_cache import KVCache

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
    """Attention heads."""
    gelu: str
    """One of GELUS."""
    head_dim: int | None = None
    """d; D / heads by default."""
    gated: bool = False
    """GEGLU in the MLP: value * GELU(gate)."""
    matrices: int = 1
    """q, k and v come from one matrix, or from 3."""
    qkv_bias: bool = True
    """Of the matrices of q, k and v."""
    out_bias: bool = True
    """Of the output matrix of attention."""
    mlp_bias: bool = True
    """Of both matrices of the MLP."""
    sandwich: bool = False
    """A norm after each path too."""
    bound: float | None = None
    """Largest magnitude that attention gives."""

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
    """Multi-head self-attention; where the model has rotary angles, values are rotated too."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        width, inner, count = config.width, config.inner, config.matrices
        self.heads, self.bound = config.heads, config.bound
        self.qkv = Projections(nn.Linear(width, 3 * inner // count, config.qkv_bias) for _ in range(count))
        self.out = nn.Linear(inner, width, config.out_bias)

    def forward(
        self, x: Tensor, mask: Tensor, prefix_len: int, cache: KVCache | None, angles: Tensor | None
    ) -> Tensor:
        """x (B, n, D) of the first inputs under mask (n, n); a cache takes the first `prefix_len` as text."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k, v = (rotate(part, angles) for part in (q, k, v))
        if cache is not None:
            cache.prefill(k, v, prefix_len)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self._bounded(self.out(rearrange(mixed, "b h n d -> b n (h d)")))

    def step(self, x: Tensor, cache: KVCache, position: int | Tensor, angles: Tensor | None) -> Tensor:
        """x (B, D) of one image token of every stream."""
        shape = {"c": cache.captions, "h": self.heads, "three": 3}
        q, k, v = rearrange(self.qkv(x), "(c n) (three h d) -> three (c h) n d", **shape)
        q, k, v = (rotate(part, angles) for part in (q, k, v))
        mixed = cache.attend(q, k, v, position)
        return self._bounded(self.out(rearrange(mixed, "(c h) n d -> (c n) (h d)", h=self.heads)))

    def _bounded(self, x: Tensor) -> Tensor:
        return x if self.bound is None else x.clamp(-self.bound, self.bound)


def rotate(x: Tensor, angles: Tensor | None) -> Tensor:
    """The first r numbers of x (..., n, d), in pairs, by angles (n, r)."""
    if angles is None:
        return x
    turned, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    one, other = turned.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-other, one], dim=-1).flatten(-2)
    return torch.cat([(turned * angles.cos() + across * angles.sin()).to(x.dtype), rest], dim=-1)


class MLP(nn.Module):
    """D -> 4 D -> D."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.expand = nn.Linear(config.width, (8 if config.gated else 4) * config.width, config.mlp_bias)
        self.project = nn.Linear(4 * config.width, config.width, config.mlp_bias)
        self.gelu, self.gated = GELUS[config.gelu], config.gated

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            value, gate = self.expand(x).chunk(2, dim=-1)
            return self.project(value * self.gelu(gate))
        return self.project(self.gelu(self.expand(x)))


class ResidualPath(ResidualBlock):
    """What a layer adds to the trunk: f(norm(x)), in a sandwich normed again."""

    def __init__(self, config: BlockConfig, f: nn.Module):
        super().__init__(config.width, f)
        self.norm_out = FP32LayerNorm(config.width) if config.sandwich else nn.Identity()

    def forward(self, x: Tensor, *rest) -> Tensor:
        """x (B, n, D), and what f takes besides."""
        return self.norm_out(super().forward(x, *rest))


class Layer(nn.Module):
    """Attention, then MLP; the trunk stays fp32."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.attention = ResidualPath(config, Attention(config))
        self.mlp = ResidualPath(config, MLP(config))

    def forward(self, x: Tensor, *rest) -> Tensor:
        x = x + self.attention(x, *rest)
        return x + self.mlp(x)

    def step(self, x: Tensor, cache: KVCache, position: int | Tensor, angles: Tensor | None) -> Tensor:
        """One image token of every stream (B, D), computed in the number format of the matrices."""
        attention, mlp = self.attention, self.mlp
        dtype = mlp.f.expand.weight.dtype
        x = x + attention.norm_out(attention.f.step(attention.norm(x).to(dtype), cache, position, angles))
        return x + mlp.norm_out(mlp.f(mlp.norm(x).to(dtype)))

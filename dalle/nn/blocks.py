"""Pre-norm transformer blocks (paper section 2.2, after Child et al. 2019).

B batch, N slots, D width, H heads
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle.nn.attention import attend
from dalle.nn.cache import LayerCache


class FP32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in fp32 under any autocast; the result is fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Attention(nn.Module):
    """Multi-head self-attention under a mask, with an optional cache of earlier slots."""

    def __init__(self, width: int, heads: int, backend: str = "sdpa"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor, start: int = 0, cache: LayerCache | None = None) -> Tensor:
        """x (B, n, D) of slots start .. start + n; mask bool (n, start + n)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if cache is not None:
            k, v = cache.append(start, k, v)
        if x.shape[1] == 1:  # sampling: read only the keys that this slot sees
            seen = mask[0].nonzero()[:, 0]
            k, v, mask = k.index_select(2, seen), v.index_select(2, seen), mask[:, seen]
        mixed = attend(q, k.to(q.dtype), v.to(q.dtype), mask, self.backend)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """D -> 4 D -> D with GELU as x sigmoid(1.702 x) (Child et al.)."""

    def __init__(self, width: int):
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.silu(1.702 * self.expand(x)) / 1.702)


class Layer(nn.Module):
    """Two resblocks: attention, then MLP, each x + f(norm(x)); the trunk stays fp32."""

    def __init__(self, width: int, heads: int, backend: str = "sdpa"):
        super().__init__()
        self.attention_norm = FP32LayerNorm(width)
        self.attention = Attention(width, heads, backend)
        self.mlp_norm = FP32LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, mask: Tensor, start: int = 0, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask, start, cache)  # (B, n, D)
        return x + self.mlp(self.mlp_norm(x))

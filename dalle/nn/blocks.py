"""Pre-norm transformer blocks (paper section 2.2, after Child et al. 2019; gradient scales 2.4, Figure 4).

B batch, N positions, D width, H heads
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle.nn.attention import SparseMask, attend_with
from dalle.nn.kv_cache import CachePosition, KVCache


class FP32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in fp32 under any autocast; the result is fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Attention(nn.Module):
    """Multi-head self-attention over what the layer's kind lets it see.

    With `qk_norm` queries and keys are normalized in each head, with gains that all heads share (Dehghani et
    al. 2023, section 2; `normalize_qk` of Flax); not in the paper.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm, self.k_norm = (FP32LayerNorm(width // heads, bias=False) for _ in range(2))

    def forward(self, x: Tensor, pattern: SparseMask, backend: str, cache: KVCache | None = None) -> Tensor:
        """x (B, n, D) of the first n positions, which a cache stores for `step`; a resolved backend."""
        # x is one array where q, k and v are three
        transposed = backend == "flex" and pattern.kind == "column"
        x = pattern.to_column_major(x) if transposed else x
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if self.qk_norm:
            q, k = self.normalize(q, k)
        if cache is not None:
            cache.prefill(
                *((pattern.to_row_major(k), pattern.to_row_major(v)) if transposed else (k, v)),
                pattern.layout.text_len,
            )
        mixed = attend_with(backend, q, k, v, pattern, transposed)
        x = self.out(rearrange(mixed, "b h n d -> b n (h d)"))
        return pattern.to_row_major(x) if transposed else x

    def step(self, x: Tensor, cache: KVCache, at: CachePosition) -> Tensor:
        """x (B, D) of one image position of every sequence; what came before is in the cache."""
        shape = {"c": cache.captions, "h": self.heads, "three": 3}
        qkv = rearrange(self.qkv(x), "(c n) (three h d) -> three (c h) n d", **shape)
        if self.qk_norm:
            qkv = torch.stack([*self.normalize(qkv[0], qkv[1]), qkv[2]])
        mixed = cache.attend(qkv, at)
        return self.out(rearrange(mixed, "(c h) n d -> (c n) (h d)", h=self.heads))

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (..., d) with `qk_norm`, computed in fp32, in their own number format."""
        return self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)


class MLP(nn.Module):
    """D -> 4 D -> D with GELU as x sigmoid(1.702 x) (Child et al.)."""

    def __init__(self, width: int):
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.silu(1.702 * self.expand(x)) / 1.702)


class ResidualBlock(nn.Module):
    """The residual branch f(norm(x)), in fp32 except where autocast applies inside f.

    `gradient_scale` is a scalar tensor, or None: the gradient is multiplied by it before it enters f and
    divided by it before it joins the trunk's; NaN and Inf become 0 in both places, so that one bad block
    does not spoil those before it (Figure 4). The gradients of its own parameters stay multiplied.
    """

    def __init__(self, width: int, f: nn.Module, activation_checkpointing: bool = False):
        super().__init__()
        self.norm, self.f, self.activation_checkpointing = FP32LayerNorm(width), f, activation_checkpointing
        self.gradient_scale: Tensor | None = None

    def forward(self, x: Tensor, *rest) -> Tensor:
        """x (B, n, D) and the other arguments of f."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            # nothing in a block is random: no state of random numbers is read from the GPU and kept
            return checkpoint(self._scaled, x, *rest, use_reentrant=False, preserve_rng_state=False)
        return self.f(self.norm(x), *rest) if self.gradient_scale is None else self._scaled(x, *rest)

    def _scaled(self, x: Tensor, *rest) -> Tensor:
        if self.gradient_scale is None:
            return self.f(self.norm(x), *rest)
        inside = scale_gradient(x, 1 / self.gradient_scale)
        return scale_gradient(self.f(self.norm(inside), *rest).float(), self.gradient_scale)


class TransformerBlock(nn.Module):
    """Two resblocks: attention, then MLP, each x + f(norm(x)); the trunk stays fp32."""

    def __init__(self, width: int, heads: int, activation_checkpointing: bool = False, qk_norm: bool = False):
        super().__init__()
        self.attention = ResidualBlock(width, Attention(width, heads, qk_norm), activation_checkpointing)
        self.mlp = ResidualBlock(width, MLP(width), activation_checkpointing)

    def forward(self, x: Tensor, pattern: SparseMask, backend: str, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(x, pattern, backend, cache)  # (B, n, D)
        return x + self.mlp(x)

    def step(self, x: Tensor, cache: KVCache, at: CachePosition) -> Tensor:
        """One image position of every sequence (B, D), computed in the number format of the matrices."""
        attention, mlp = self.attention.f, self.mlp.f
        x = x + attention.step(self.attention.norm(x).to(attention.qkv.weight.dtype), cache, at)
        return x + mlp(self.mlp.norm(x).to(mlp.expand.weight.dtype))


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return torch.nan_to_num(gradient * factor, nan=0.0, posinf=0.0, neginf=0.0), None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x, whose gradient is multiplied by a factor, NaN and Inf then set to 0."""
    return _ScaleGradient.apply(x, factor)

"""Blocks of the U-Net (Dhariwal and Nichol 2021, "ADM"; GLIDE), with OpenAI's parameter names.

B batch, C channels, H W sides, E width of the embedding of time
T positions of the context, D their width, N = H W, h heads of width d
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle.unet.config import GROUPS, EncoderConfig


class FP32GroupNorm(nn.GroupNorm):
    """Group norm computed in fp32 under any autocast; the result has the input's number format."""

    def __init__(self, width: int):
        super().__init__(GROUPS, width)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


class Pointwise(nn.Conv1d):
    """A linear layer of (B, N, C) whose weight has a convolution's shape (out, in, 1)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, :, 0], self.bias)


def conv3(n_in: int, n_out: int) -> nn.Conv2d:
    """A 3 x 3 convolution."""
    return nn.Conv2d(n_in, n_out, 3, padding=1)


def zeros(layer: nn.Module) -> nn.Module:
    """The layer with zeros for its weights, so that a residual branch begins as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Times (B,), which may be fractional -> fp32 (B, width): cosines, then sines, of falling frequency."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device))
    angles = t[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


class ResBlock(nn.Module):
    """x + two convolutions; the embedding scales and shifts the norm between them (adaptive group norm).

    `resample` halves or doubles the sides of both summands.
    """

    def __init__(self, n_in: int, n_out: int, config: EncoderConfig, resample: nn.Module | None = None):
        super().__init__()
        self.scale_shift, emb_width = config.scale_shift, 4 * config.width
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(FP32GroupNorm(n_in), nn.SiLU(), conv3(n_in, n_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_width, (1 + config.scale_shift) * n_out))
        self.out_layers = nn.Sequential(
            FP32GroupNorm(n_out), nn.SiLU(), nn.Dropout(config.dropout), zeros(conv3(n_out, n_out))
        )
        self.skip_connection = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W), emb (B, E)."""
        norm, silu, conv = self.in_layers
        h = conv(self.resample(silu(norm(x))))
        emb = self.emb_layers(emb)[:, :, None, None]
        norm, silu, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb)
        return self.skip_connection(self.resample(x)) + conv(dropout(silu(h)))


class Attention(nn.Module):
    """x + attention of every position to the context and to every position, in one softmax."""

    def __init__(self, width: int, config: EncoderConfig, context_width: int | None = None):
        super().__init__()
        self.heads = config.heads or width // config.head_width
        inner = "h parts d" if config.attention_order == "legacy" else "parts h d"
        self.order = f"b n ({inner}) -> parts b h n d"
        self.norm, self.qkv = FP32GroupNorm(width), Pointwise(width, 3 * width)
        self.encoder_kv = Pointwise(context_width, 2 * width) if context_width else None
        self.proj_out = zeros(Pointwise(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), context (B, T, D), mask bool (B, T) of the context that is seen."""
        image = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = rearrange(self.qkv(image), self.order, parts=3, h=self.heads)  # (B, h, N, d)
        if context is not None:
            context_k, context_v = rearrange(self.encoder_kv(context), self.order, parts=2, h=self.heads)
            k, v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)
        if mask is not None:
            mask = F.pad(mask, (0, image.shape[1]), value=True)[:, None, None]  # (B, 1, 1, T + N)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self.proj_out(rearrange(mixed, "b h n d -> b n (h d)"))
        return x + out.transpose(1, 2).reshape(x.shape)


class Block(nn.Sequential):
    """Layers between two skip connections: a convolution, or a resblock with what follows it."""

    def __init__(self, layers: list[nn.Module], config: EncoderConfig):
        super().__init__(*layers)
        self.activation_checkpointing, self.random = config.activation_checkpointing, config.dropout > 0

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None, mask: Tensor | None = None):
        if self.activation_checkpointing and torch.is_grad_enabled():
            options = {"use_reentrant": False, "preserve_rng_state": self.random}
            return checkpoint(self.run, x, emb, context, mask, **options)
        return self.run(x, emb, context, mask)

    def run(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """The layers in order, each with what it reads."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, Attention):
                x = layer(x, context, mask)
            else:
                x = layer(x)
        return x

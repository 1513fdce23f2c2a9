"""Text transformer of GLIDE (Nichol et al. 2021, section 4.1), with the parameter names of its release.

Bidirectional and without a mask: pads are read too. A pad has one learned vector for each position, in place
of a token's and a position's.

    B batch, T text positions, D width, H heads
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle.layout import check_tokens
from dalle.nn.blocks import FP32LayerNorm


class Attention(nn.Module):
    """Attention of every position to every position; channels of q, k and v as (heads, 3, d)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_qkv, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.c_qkv(x), "b t (h three d) -> three b h t d", three=3, h=self.heads)
        return self.c_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class TextBlock(nn.Module):
    """x + attention, x + MLP with the exact GELU, each after a norm; the trunk stays fp32."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.attn = FP32LayerNorm(width), Attention(width, heads)
        layers = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": nn.GELU(),
            "c_proj": nn.Linear(4 * width, width),
        }
        self.ln_2, self.mlp = FP32LayerNorm(width), nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    """Input vectors (B, T, D) -> states (B, T, D)."""

    def __init__(self, width: int, layers: int, heads: int, activation_checkpointing: bool = False):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x


def pack_text(
    captions: Sequence[Sequence[int]], text_len: int, text_vocab: int, truncate: bool = False
) -> Tensor:
    """Text ids of captions -> int64 (B, T), filled up with the pad `text_vocab`; no caption is all pads.

    Raises:
        ValueError: an id outside the vocabulary, or more than `text_len` ids without `truncate`.
    """
    rows = torch.full((len(captions), text_len), text_vocab)
    for row, ids in zip(rows, captions, strict=True):
        if len(ids) > text_len and not truncate:
            raise ValueError(f"a caption has {len(ids)} tokens, at most {text_len} fit; shorten it")
        kept = torch.tensor(list(ids[:text_len]), dtype=torch.int64)
        check_tokens(kept[None], text_vocab, "text ids")
        row[: len(kept)] = kept
    return rows

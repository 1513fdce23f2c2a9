"""Attention of queries over the keys that a kind of layer lets them see: one function, several backends.

    dense    the softmax over all keys written out, the reference
    sdpa     torch's fused kernel with a mask
    blocks   scores only where a kind can see: the text, and the rows above or the own column

All are equal in value and gradient (tests/test_attention.py).

    B batch, H heads, Q queries, K keys, d width of a head, T text_len, R rows and C columns of the grid
    G groups of M image queries that share their L near keys
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle.layout import TokenLayout
from dalle.masks import dense_mask, visible

BACKENDS = ("dense", "sdpa", "blocks")


class Pattern(nn.Module):
    """Who sees whom in layers of one kind, worked out once for a layout.

    Args:
        kind: see dalle/masks.py.
        layout: lengths of the stream.
        kernel: side of the convolution.
    """

    def __init__(self, kind: str, layout: TokenLayout, kernel: int = 11):
        super().__init__()
        self.kind, self.layout = kind, layout
        self.rows_above = {"row": 1, "conv": (kernel + 1) // 2}.get(kind, 0)
        self.register_buffer("mask", dense_mask(kind, layout, kernel), persistent=False)  # (N, N)
        if kind != "causal":
            self.register_buffer("near", self._near_mask(kernel), persistent=False)  # (G, M, L)

    def group(self, x: Tensor) -> Tensor:
        """Image slots in raster order (B, H, R * C, d) -> (B, H, G, M, d): by rows, or by columns for "column"."""
        order = "b h (r c) d -> b h c r d" if self.kind == "column" else "b h (r c) d -> b h r c d"
        return rearrange(x, order, r=self.layout.rows)

    def ungroup(self, x: Tensor) -> Tensor:
        """The way back: (B, H, G, M, d) -> (B, H, R * C, d)."""
        return rearrange(x, "b h c r d -> b h (r c) d" if self.kind == "column" else "b h r c d -> b h (r c) d")

    def near_keys(self, x: Tensor) -> Tensor:
        """Grouped keys (B, H, G, M, d) -> (B, H, G, L, d): each group's own and those of the rows above it."""
        above, rows = self.rows_above, x.shape[2]
        if not above:
            return x
        padded = F.pad(x, (0, 0, 0, 0, above, 0))
        return torch.cat([padded[:, :, i : i + rows] for i in range(above + 1)], dim=3)

    def _near_mask(self, kernel: int) -> Tensor:
        layout = self.layout
        index = (
            torch.arange(layout.image_len, dtype=torch.float32)[None, None, :, None] + 1
        )  # 0 marks what is not there
        queries = self.group(index)  # (1, 1, G, M, 1)
        keys = self.near_keys(queries).transpose(-1, -2)  # (1, 1, G, 1, L)
        sees = visible(self.kind, layout, kernel)(queries.long() + layout.text_len, keys.long() + layout.text_len)
        return (sees & (keys > 0))[0, 0]


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, start: int = 0, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the visible keys; one softmax for text and image keys (2.2).

    Args:
        q: (B, H, Q, d), of slots start .. start + Q.
        k, v: (B, H, start + Q, d), of all slots up to there.
        pattern: the kind of the layer.
        start: first slot of the queries.
        backend: one of BACKENDS; "blocks" needs the whole stream and takes "dense" for parts of it.

    Returns:
        (B, H, Q, d).
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    whole = q.shape[2] == pattern.layout.length
    if backend == "blocks" and whole and pattern.kind != "causal":
        return _by_blocks(q, k, v, pattern)
    mask = pattern.mask[start : start + q.shape[2], : k.shape[2]]
    if q.shape[2] == 1:  # sampling: read only the keys that this slot sees
        seen = mask[0].nonzero()[:, 0]
        k, v, mask = k.index_select(2, seen), v.index_select(2, seen), mask[:, seen]
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return _scores(q, k, mask).softmax(-1).to(v.dtype) @ v


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    text, shape = pattern.layout.text_len, q.shape
    text_k, text_v = k[:, :, :text], v[:, :, :text]
    text_out = _scores(q[:, :, :text], text_k, pattern.mask[:text, :text]).softmax(-1).to(v.dtype) @ text_v
    image_q = pattern.group(q[:, :, text:])  # (B, H, G, M, d)
    near_k, near_v = (pattern.near_keys(pattern.group(x[:, :, text:])) for x in (k, v))  # (B, H, G, L, d)
    to_text = _scores(image_q.flatten(2, 3), text_k).view(*image_q.shape[:-1], text)
    weights = torch.cat([to_text, _scores(image_q, near_k, pattern.near)], dim=-1).softmax(-1).to(v.dtype)
    from_text = (weights[..., :text].flatten(2, 3) @ text_v).view(image_q.shape)
    image_out = pattern.ungroup(from_text + weights[..., text:] @ near_v)
    return torch.cat([text_out, image_out], dim=2).view(shape)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)

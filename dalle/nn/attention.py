"""Sparse attention (paper section 2.2, Figure 11): the mask of a kind of layer, and several backends.

    dense    the softmax over all keys written out, the reference
    sdpa     torch's fused kernel, with a mask or causal
    window   scores only where a kind can see: the text, and the rows above or the own column
    flex     FlexAttention over blocks of visible pairs (dalle/nn/flex_attention.py); gradients on CUDA only
    auto     one of these, by `resolve_backend`

All are equal in value and gradient (tests/nn/test_attention.py); the gradients of flex are tested on a GPU.
Every form of a mask evaluates the predicate of dalle/masks.py. It is built when a backend first needs it and
kept for that device, so a model that never needs a mask of all N x N pairs never builds one.

    B batch, H heads, N positions, Q queries, K keys, d width of a head, T text_len
    R rows and C columns of the grid; G groups of M image queries that share their L near keys
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dalle.layout import TokenLayout
from dalle.masks import dense_mask, visible
from dalle.nn import ATTENTION_BACKENDS
from dalle.nn.flex_attention import flex_attend, flex_refusal


class SparseMask:
    """The visible pairs of one kind of layer.

    Args:
        kind: see dalle/masks.py.
        layout: lengths of the sequence.
        kernel: side of the convolution.

    Raises:
        ValueError: as `masks.visible`.
    """

    def __init__(self, kind: str, layout: TokenLayout, kernel: int = 11):
        visible(kind, layout, kernel)  # refuses what cannot be
        self.kind, self.layout, self.kernel = kind, layout, kernel
        self.rows_above = {"row": 1, "conv": (kernel + 1) // 2}.get(kind, 0)
        self._dense: Tensor | None = None
        self._near: Tensor | None = None
        self._blocks: BlockMask | None = None

    @torch.inference_mode(False)  # what sampling builds must also serve training
    def dense(self, device: torch.device) -> Tensor:
        """bool (N, N), True = visible, raster order."""
        if self._dense is None or self._dense.device != device:
            self._dense = dense_mask(self.kind, self.layout, self.kernel).to(device)
        return self._dense

    @torch.inference_mode(False)
    def near(self, device: torch.device) -> Tensor:
        """bool (G, M, L): which of its near keys each image query sees."""
        if self._near is None or self._near.device != device:
            self._near = self._near_mask().to(device)
        return self._near

    @torch.inference_mode(False)
    def blocks(self, device: torch.device) -> BlockMask:
        """FlexAttention's blocks of 128 x 128; for "column" over `to_column_major` positions (11c)."""
        if self._blocks is None or self._blocks.kv_num_blocks.device != device:
            self._blocks = self._block_mask(device)
        return self._blocks

    # Image positions by groups, for scores over near keys alone.

    def group(self, x: Tensor) -> Tensor:
        """Image positions in raster order (B, H, R * C, d) -> (B, H, G, M, d): by rows, or by columns."""
        order = "b h (r c) d -> b h c r d" if self.kind == "column" else "b h (r c) d -> b h r c d"
        return rearrange(x, order, r=self.layout.grid[0])

    def ungroup(self, x: Tensor) -> Tensor:
        """The way back: (B, H, G, M, d) -> (B, H, R * C, d)."""
        order = "b h c r d -> b h (r c) d" if self.kind == "column" else "b h r c d -> b h (r c) d"
        return rearrange(x, order)

    def near_keys(self, x: Tensor) -> Tensor:
        """Grouped keys (B, H, G, M, d) -> (B, H, G, L, d): of each group and of the rows above it."""
        above, rows = self.rows_above, x.shape[2]
        if not above:
            return x
        padded = F.pad(x, (0, 0, 0, 0, above, 0))
        return torch.cat([padded[:, :, i : i + rows] for i in range(above + 1)], dim=3)

    def _near_mask(self) -> Tensor:
        layout, text_len = self.layout, self.layout.text_len
        positions = torch.arange(1, layout.num_image_tokens + 1, dtype=torch.float32)  # 0: none above the top
        queries = self.group(positions[None, None, :, None])  # (1, 1, G, M, 1)
        keys = self.near_keys(queries).transpose(-1, -2)  # (1, 1, G, 1, L)
        sees = visible(self.kind, layout, self.kernel)(queries.long() + text_len, keys.long() + text_len)
        return (sees & (keys > 0))[0, 0]

    # All positions with rows and columns of the image exchanged (Figure 11c), for blocks of pairs.

    def to_column_major(self, x: Tensor) -> Tensor:
        """(..., N, d) in raster order -> image positions column by column."""
        return self._exchange(x, "... (r c) d -> ... (c r) d")

    def to_row_major(self, x: Tensor) -> Tensor:
        """The way back."""
        return self._exchange(x, "... (c r) d -> ... (r c) d")

    def _exchange(self, x: Tensor, order: str) -> Tensor:
        text, image = x.split([self.layout.text_len, self.layout.num_image_tokens], dim=-2)
        return torch.cat([text, rearrange(image, order, r=self.layout.grid[0])], dim=-2)

    def _block_mask(self, device: torch.device) -> BlockMask:
        layout, sees = self.layout, visible(self.kind, self.layout, self.kernel)
        text, rows, columns = layout.text_len, layout.rows, layout.columns

        def raster_position(position: Tensor) -> Tensor:
            image = position - text
            return torch.where(position < text, position, text + image % rows * columns + image // rows)

        def straight(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees(q, k)

        def exchanged(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees(raster_position(q), raster_position(k))

        rule = exchanged if self.kind == "column" else straight
        return create_block_mask(rule, None, None, layout.seq_len, layout.seq_len, device=device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: SparseMask,
    backend: str = "auto",
    transposed: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the visible keys; one softmax for text and image keys (2.2).

    Args:
        q, k, v: (B, H, Q, d), of the first Q positions.
        pattern: the kind of the layer.
        backend: one of ATTENTION_BACKENDS; "window" and "flex" need the whole sequence, its beginning takes
            "dense" and "sdpa".
        transposed: q, k, v and the result are `pattern.to_column_major`; so "flex" wants its column layers.

    Returns:
        (B, H, Q, d).

    Raises:
        ValueError: an unknown backend, or one that the device cannot run.
    """
    backend = resolve_backend(backend, pattern, q.shape[2], q.device, q.shape[3])
    return attend_with(backend, q, k, v, pattern, transposed)


def attend_with(
    backend: str, q: Tensor, k: Tensor, v: Tensor, pattern: SparseMask, transposed: bool = False
) -> Tensor:
    """`attend` by a backend that `resolve_backend` gave: what compiled layers call."""
    if transposed != (backend == "flex" and pattern.kind == "column"):
        there, back = (
            (pattern.to_row_major, pattern.to_column_major)
            if transposed
            else (pattern.to_column_major, pattern.to_row_major)
        )
        return back(attend_with(backend, there(q), there(k), there(v), pattern, not transposed))
    if backend == "window":
        return _attend_window(q, k, v, pattern)
    if backend == "flex":
        return flex_attend(q, k, v, pattern)
    if backend == "sdpa" and pattern.kind == "causal":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = pattern.dense(q.device)[: q.shape[2], : q.shape[2]]
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return _scores(q, k, mask).softmax(-1).to(v.dtype) @ v


def resolve_backend(
    backend: str, pattern: SparseMask, queries: int, device: torch.device, head_dim: int
) -> str:
    """The backend for a number of queries.

    "auto" is torch's fused causal kernel for causal layers; for sparse layers on a CPU "window", the fastest
    measured there (docs/log.md), elsewhere torch's kernel under a mask. The beginning of a
    sequence, with fewer queries than positions, is computed by "dense" or "sdpa".

    Raises:
        ValueError: an unknown backend, or one that the device cannot run.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(ATTENTION_BACKENDS)}")
    if backend == "auto":
        backend = "window" if pattern.kind != "causal" and device.type == "cpu" else "sdpa"
    if backend == "flex" and (refusal := flex_refusal(device, head_dim)):
        raise ValueError(refusal)
    if queries < pattern.layout.seq_len:
        return "dense" if backend in ("dense", "window") else "sdpa"
    return "dense" if backend == "window" and pattern.kind == "causal" else backend


def build_mask(backend: str, pattern: SparseMask, device: torch.device) -> None:
    """Builds the mask that a resolved backend reads, so that compiled code finds it cached."""
    if backend == "flex":
        pattern.blocks(device)
    elif backend == "window":
        pattern.near(device)
    elif backend == "dense" or pattern.kind != "causal":
        pattern.dense(device)


def _attend_window(q: Tensor, k: Tensor, v: Tensor, pattern: SparseMask) -> Tensor:
    text, shape = pattern.layout.text_len, q.shape
    text_k, text_v = k[:, :, :text], v[:, :, :text]
    text_out = F.scaled_dot_product_attention(q[:, :, :text], text_k, text_v, is_causal=True)
    image_q = pattern.group(q[:, :, text:])  # (B, H, G, M, d)
    near_k = pattern.near_keys(pattern.group(k[:, :, text:]))  # (B, H, G, L, d)
    near_v = pattern.near_keys(pattern.group(v[:, :, text:]))
    to_text = _scores(image_q.flatten(2, 3), text_k).view(*image_q.shape[:-1], text)
    to_near = _scores(image_q, near_k, pattern.near(q.device))
    weights = torch.cat([to_text, to_near], dim=-1).softmax(-1).to(v.dtype)
    from_text = (weights[..., :text].flatten(2, 3) @ text_v).view(image_q.shape)
    image_out = pattern.ungroup(from_text + weights[..., text:] @ near_v)
    return torch.cat([text_out, image_out], dim=2).view(shape)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """q k^T / sqrt(d) in fp32, -inf where the mask hides; the division by q's side, which is smaller."""
    scores = (q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)).float()
    return scores if mask is None else scores.masked_fill_(~mask, -torch.inf)

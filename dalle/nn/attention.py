"""Masked attention: one function, several backends.

    dense    the softmax over all keys written out, the reference
    sdpa     torch's fused kernel, with a mask or causal
    window   scores only where a kind can see: the text, and the rows above or the own column
    flex     FlexAttention over blocks of visible pairs (dalle/nn/flex_attention.py); gradients on CUDA only
    auto     one of these, by `auto_backend`

All are equal in value and gradient (tests/nn/test_attention.py); the gradients of flex are tested where there
is a GPU.

    B batch, H heads, Q queries, K keys, d width of a head, T text_len
    G groups of M image queries that share their L near keys
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.nn import ATTENTION_BACKENDS
from dalle.nn.flex_attention import flex_attend, flex_refusal
from dalle.nn.sparse_mask import SparseMask


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
        q, k, v: (B, H, Q, d), of the first Q slots.
        pattern: the kind of the layer.
        backend: one of ATTENTION_BACKENDS; "window" and "flex" need the whole stream, its beginning takes
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
    if transposed != uses_column_major(backend, pattern):
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
    measured there (docs/log.md), elsewhere torch's kernel under a mask. The beginning of a sequence, with fewer
    queries than positions, is computed by "dense" or "sdpa".

    Raises:
        ValueError: an unknown backend, or one that the device cannot run.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(
            f"unknown attention backend {backend!r}; expected one of {', '.join(ATTENTION_BACKENDS)}"
        )
    if backend == "auto":
        backend = "window" if pattern.kind != "causal" and device.type == "cpu" else "sdpa"
    if backend == "flex" and (refusal := flex_refusal(device, head_dim)):
        raise ValueError(refusal)
    if queries < pattern.layout.seq_len:
        return "dense" if backend in ("dense", "window") else "sdpa"
    return "dense" if backend == "window" and pattern.kind == "causal" else backend


def uses_column_major(backend: str, pattern: SparseMask) -> bool:
    """Whether a resolved backend works with rows and columns of the image exchanged (Figure 11c)."""
    return backend == "flex" and pattern.kind == "column"


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
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)

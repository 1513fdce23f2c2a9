"""Attention of queries over keys under a mask: one function, several ways to compute it.

`dense` writes the softmax out and is the reference; `sdpa` is torch's fused kernel, equal to it in
value and gradient (tests/test_attention.py).

    B batch, H heads, Q queries, K keys, d width of a head
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("dense", "sdpa")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the visible keys; one softmax for text and image keys (2.2).

    Args:
        q: (B, H, Q, d).
        k, v: (B, H, K, d).
        mask: bool (Q, K), True = visible; each query sees at least one key.
        backend: one of BACKENDS.

    Returns:
        (B, H, Q, d).
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if backend == "dense":
        scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
        return weights.to(v.dtype) @ v
    raise ValueError(f"unknown attention backend {backend!r}; expected one of {', '.join(BACKENDS)}")

"""Sampling of tokens from logits: temperature, top-k, top-p. The random numbers are arguments.

Those of candidate i of a prompt depend on (seed, prompt, i, position) alone, so it is the same image
whatever the batch, the order or the number of candidates.

    B batch, V vocabulary, n candidates, N positions
"""

import numpy as np
import torch
from torch import Tensor

from dalle.io.rng import generator


def candidate_noise(seed: int, prompt: str, candidates: range, positions: int) -> Tensor:
    """Random numbers of candidates of a prompt: float64 (n, positions) in [0, 1)."""
    rows = [generator("candidate", seed, i, prompt).random(positions) for i in candidates]
    return torch.from_numpy(np.stack(rows))


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Samples one id per row by inverting the cumulative distribution.

    Args:
        logits: (B, V); -inf is never sampled.
        uniform: (B,) in [0, 1).
        temperature: above 0, or 0 for the most likely id; `dalle.pipelines.config.SamplingConfig` checks all
            three.
        top_k: keep the k most likely ids.
        top_p: keep the fewest most likely ids whose probability reaches p.

    Returns:
        int64 (B,).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, ids = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, values)
    if top_p is not None and top_p < 1:
        logits = _nucleus(logits, top_p)
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative = torch.softmax(logits, dim=-1).to(precise).cumsum(dim=-1)
    target = uniform.to(precise).to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """-inf for ids outside the smallest set whose probability reaches top_p (at least one stays)."""
    values, order = logits.sort(dim=-1, descending=True)
    probability = torch.softmax(values, dim=-1)
    outside = probability.cumsum(dim=-1) - probability >= top_p
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)

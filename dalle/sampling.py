"""Logits -> ids. The random numbers come from outside, so a draw is a plain function.

Candidate i of a caption uses uniforms that depend on (seed, caption, i, position) alone: it is the
same image whatever the batch, the order or the number of candidates.

    B batch, V vocabulary, n candidates, N positions
"""

import math

import numpy as np
import torch
from torch import Tensor

from dalle.io.rng import generator

MIN_TEMPERATURE = 1e-30
"""Logits divided by less might be more than a float holds."""


def candidate_noise(seed: int, caption: str, candidates: range, positions: int) -> Tensor:
    """The random numbers of some candidates: float64 (n, positions) in [0, 1)."""
    rows = [generator("candidate", seed, i, caption).random(positions) for i in candidates]
    return torch.from_numpy(np.stack(rows))


def check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, guidance: float | None = None
) -> None:
    """ValueError for settings that mean nothing, before any work is done."""
    if not (temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf):
        raise ValueError(
            f"temperature must be 0 (most likely token) or at least {MIN_TEMPERATURE}, got {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance must be a number, 1 for the plain model, got {guidance}")


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """One id per row, by inverting the cumulative distribution.

    Args:
        logits: (B, V); -inf is never drawn.
        uniform: (B,) in [0, 1).
        temperature: 1 as the paper; 0 takes the most likely id.
        top_k: keep the k most likely ids.
        top_p: keep the fewest most likely ids whose probability reaches p.

    Returns:
        int64 (B,).
    """
    check_sampling(temperature, top_k, top_p)
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

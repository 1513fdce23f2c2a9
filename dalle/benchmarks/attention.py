"""Attention alone, forward and backward: a model's layers by each backend against as many causal layers.

Each kind of layer is timed once a round and counted as often as the model has it. Causal layers are timed by
FlexAttention and by torch's fused `is_causal` kernel.
"""

from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dalle.benchmarks.common import finish, seconds_of
from dalle.benchmarks.config import AttentionBenchmark
from dalle.nn.attention import SparseMask, attend_with, resolve_backend
from dalle.train.precision import DTYPES, resolve_device, resolve_precision

WARMUP_ROUNDS = 3


def benchmark_attention(args: AttentionBenchmark) -> dict[str, Any]:
    """Seconds of all layers by each backend, and of as many causal layers."""
    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    counts, config = Counter(args.config.kinds), args.config
    generator = torch.Generator().manual_seed(0)
    shape = (4, args.batch_size, args.heads, config.layout.seq_len, config.head_dim)
    *qkv, gradient = torch.randn(shape, generator=generator).to(device, DTYPES[precision])
    inputs = [*(x.requires_grad_() for x in qkv), gradient]
    cases = [(backend, kind) for backend in args.backends for kind in counts]
    causal = ["sdpa", "flex"] if device.type == "cuda" else ["sdpa"]  # flex has no backward elsewhere
    layers = {(backend, kind): _layer(backend, kind, args, inputs) for backend, kind in cases}
    layers |= {(f"causal {name}", "causal"): _layer(name, "causal", args, inputs) for name in causal}
    rounds = [
        {key: seconds_of(layer, device) for key, layer in layers.items()}
        for _ in range(WARMUP_ROUNDS + args.rounds)
    ][WARMUP_ROUNDS:]
    totals = [_total(times, counts) for times in rounds]
    results = {}
    for backend in totals[0]:
        results[backend] = {"total_seconds": median(total[backend] for total in totals)}
        for name in causal:
            ratios = [total[f"causal {name}"] / total[backend] for total in totals]
            results[backend][f"speedup_vs_causal_{name}"] = median(ratios)
    masks = {kind: SparseMask(kind, config.layout, config.conv_kernel) for kind in counts}
    sizes = (shape[3], device, config.head_dim)
    auto = {kind: resolve_backend("auto", mask, *sizes) for kind, mask in masks.items()}
    report = {
        "results": results,
        "seconds_per_layer": {" ".join(key): median(times[key] for times in rounds) for key in layers},
        "layers": dict(counts),
        "auto_backend": auto,
        "shape": dict(zip(("batch", "heads", "positions", "head_dim"), shape[1:], strict=True)),
        "precision": precision,
    }
    return finish(report, args, device)


def _layer(backend: str, kind: str, args: AttentionBenchmark, inputs: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward of one layer, its image states in the order in which the model passes them."""
    mask = SparseMask(kind, args.config.layout, args.config.conv_kernel)
    q, k, v, gradient = inputs
    backend = resolve_backend(backend, mask, q.shape[2], q.device, q.shape[3])
    column_major = backend == "flex" and mask.kind == "column"
    return lambda: torch.autograd.grad(attend_with(backend, q, k, v, mask, column_major), (q, k, v), gradient)


def _total(times: dict[tuple[str, str], float], counts: Counter) -> dict[str, float]:
    """Seconds of all layers by backend."""
    total: dict[str, float] = {}
    for (name, kind), seconds in times.items():
        layers = counts.total() if name.startswith("causal") else counts[kind]
        total[name] = total.get(name, 0.0) + layers * seconds
    return total

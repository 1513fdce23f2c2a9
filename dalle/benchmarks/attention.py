"""Attention alone, forward and backward: a model's layers by each backend against as many causal layers.

Each kind of layer is timed once a round and counted as often as the model has it. Causal layers are timed by
FlexAttention and by torch's fused `is_causal` kernel.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dalle.benchmarks.common import finish, time_rounds
from dalle.benchmarks.config import AttentionBenchmark
from dalle.nn.attention import SparseMask, attend_with, resolve_backend
from dalle.train.precision import DTYPES, resolve_device, resolve_precision

WARMUP_ROUNDS = 3


def benchmark_attention(args: AttentionBenchmark) -> dict[str, Any]:
    """Seconds of all layers by each backend, and of as many causal layers."""
    device, config = resolve_device(args.device), args.config
    precision, counts = resolve_precision(args.precision, device), Counter(config.kinds)
    generator = torch.Generator().manual_seed(0)
    shape = (4, args.batch_size, config.heads, config.layout.seq_len, config.head_dim)
    *qkv, gradient = torch.randn(shape, generator=generator).to(device, DTYPES[precision])
    inputs = [*(x.requires_grad_() for x in qkv), gradient]
    masks = {kind: SparseMask(kind, config.layout, config.conv_kernel) for kind in {*counts, "causal"}}
    causal = ["sdpa", "flex"] if device.type == "cuda" else ["sdpa"]  # flex has no backward elsewhere
    layers = {(name, kind): _layer(name, masks[kind], inputs) for name in args.backends for kind in counts}
    layers |= {(f"causal {name}", "causal"): _layer(name, masks["causal"], inputs) for name in causal}
    time_rounds(layers, WARMUP_ROUNDS, device)
    times = time_rounds(layers, args.rounds, device)
    totals: dict[str, Any] = defaultdict(float)
    for (name, kind), seconds in times.items():
        totals[name] += seconds * (config.depth if name.startswith("causal") else counts[kind])
    results = {name: {"total_seconds": median(total)} for name, total in totals.items()}
    for name, line in results.items():
        for baseline in causal:
            line[f"speedup_vs_causal_{baseline}"] = median(totals[f"causal {baseline}"] / totals[name])
    report = {
        "results": results,
        "seconds_per_layer": {" ".join(key): median(seconds) for key, seconds in times.items()},
        "layers": dict(counts),
        "shape": dict(zip(("batch", "heads", "positions", "head_dim"), shape[1:], strict=True)),
        "precision": precision,
    }
    return finish(report, args.json, device)


def _layer(backend: str, mask: SparseMask, inputs: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward of one layer, its image states in the order in which the model passes them."""
    q, k, v, gradient = inputs
    backend = resolve_backend(backend, mask, q.shape[2], q.device, q.shape[3])
    column_major = backend == "flex" and mask.kind == "column"
    return lambda: torch.autograd.grad(attend_with(backend, q, k, v, mask, column_major), (q, k, v), gradient)

"""Attention alone, forward and backward, over the kinds of a model's layers: ours against causal attention.

Every kind is timed once a round and counted as often as the model has it; the sum is "the mix". Beside it stands
what the same layers would cost as plain causal attention: by FlexAttention and by torch's fused `is_causal` kernel.
"""

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.benchmarks.common import hardware, save_report, seconds_of
from dalle.io.files import make_directory
from dalle.nn.attention import CHOICES, attend_with, auto_backend, resolve_backend, uses_column_major
from dalle.nn.sparse_mask import SparseMask
from dalle.train.precision import DTYPES, Precision, resolve_device, resolve_precision
from dalle.transformer import TransformerConfig


@dataclass(frozen=True)
class AttentionBenchmark:
    """Times attention over the mix of a model's layers, by each backend and as causal attention."""

    model: TransformerConfig = TransformerConfig()
    """Kinds, heads and lengths; the paper's 64 layers unless given."""
    backends: tuple[str, ...] = ("auto", "sdpa", "blocks")
    """Ways of computing the mix (also dense, flex)."""
    batch_size: int = 1
    """Streams."""
    heads: int = 16
    """Heads; time grows with batch-size times heads, so a few tell as much as all."""
    rounds: int = 10
    """Timed rounds, after three that are not."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16; auto takes bf16 where the device has it in hardware."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""
    json: Path | None = None
    """File for the report; printed too."""

    def __post_init__(self):
        if min(self.batch_size, self.heads, self.rounds) < 1 or not self.backends:
            raise ValueError("batch-size, heads and rounds must be positive, and backends name at least one")
        if unknown := set(self.backends) - set(CHOICES):
            raise ValueError(f"unknown backend {min(unknown)!r}; expected one of {', '.join(CHOICES)}")


def benchmark_attention(run: AttentionBenchmark) -> dict[str, Any]:
    """Seconds of the mix by each backend, and of as many causal layers; writes --json."""
    if run.json:
        make_directory(run.json.parent)
    device = resolve_device(run.device)
    precision = resolve_precision(run.precision, device)
    counts = Counter(run.model.kinds)
    inputs = _inputs(run, device, DTYPES[precision])
    works = {(name, kind): _work(name, kind, run, inputs) for name in run.backends for kind in counts}
    causal = ["sdpa", *(["flex"] if device.type == "cuda" else [])]  # flex has no backward elsewhere
    works |= {(f"causal {name}", "causal"): _work(name, "causal", run, inputs) for name in causal}
    rounds = [{key: seconds_of(work, device) for key, work in works.items()} for _ in range(run.rounds + 3)][
        3:
    ]
    mixes = [_mix(times, counts) for times in rounds]
    report = {
        "layers": dict(counts),
        "chosen_by_auto": {kind: auto_backend(kind, device) for kind in counts},
        "seconds_of_the_mix": {name: statistics.median(mix[name] for mix in mixes) for name in mixes[0]},
        "times_as_fast": {
            f"{ours} as {theirs}": statistics.median(mix[theirs] / mix[ours] for mix in mixes)
            for ours in run.backends
            for theirs in (f"causal {name}" for name in causal)
        },
        "seconds_of_a_layer": {
            " ".join(key): statistics.median(times[key] for times in rounds) for key in works
        },
        "shape": {
            "batch": run.batch_size,
            "heads": run.heads,
            "slots": run.model.layout.seq_len,
            "width": run.model.head_dim,
        },
        "precision": precision,
        "hardware": hardware(device),
    }
    save_report(report, run.json)
    for name in ("hardware", "seconds_of_a_layer", "seconds_of_the_mix", "times_as_fast"):
        shown = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in report[name].items()
        )
        print(f"{name.replace('_', ' ')}: {', '.join(shown)}")
    return report


def _inputs(run: AttentionBenchmark, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (4, run.batch_size, run.heads, run.model.layout.seq_len, run.model.head_dim)
    *inputs, gradient = torch.randn(shape, generator=generator).to(device, dtype)
    return [*(x.requires_grad_() for x in inputs), gradient]


def _work(backend: str, kind: str, run: AttentionBenchmark, inputs: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward of one layer, its image states in the order in which the model hands them over."""
    pattern = SparseMask(kind, run.model.layout, run.model.conv_kernel)
    q, k, v, gradient = inputs
    backend = resolve_backend(backend, pattern, q.shape[2], q.device, q.shape[3])
    transposed = uses_column_major(backend, pattern)
    return lambda: torch.autograd.grad(
        attend_with(backend, q, k, v, pattern, transposed), (q, k, v), gradient
    )


def _mix(times: dict[tuple[str, str], float], counts: Counter) -> dict[str, float]:
    """Seconds of all layers by name."""
    mix: dict[str, float] = {}
    for (name, kind), seconds in times.items():
        layers = counts.total() if name.startswith("causal") else counts[kind]
        mix[name] = mix.get(name, 0.0) + layers * seconds
    return mix

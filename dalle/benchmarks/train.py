"""Speed of a transformer's training step: attention backends, and DALLE-pytorch, in one run.

Every round times each contender once; medians of the rounds and of the ratios within a round are reported.
MFU is that of the training log (dalle/train/loggers.py); `matmul_utilization` is the same FLOP/s over
what a large matrix product reaches on the device in that run.
"""

from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle.benchmarks.common import Stepper, finish, matmul_rate, random_ids, seconds_of
from dalle.benchmarks.config import TrainBenchmark
from dalle.benchmarks.dalle_pytorch import DallePytorchStep
from dalle.train.loggers import peak_flops, peak_memory
from dalle.train.precision import resolve_device, resolve_precision
from dalle.transformer.objective import TransformerObjective
from dalle.transformer.sizes import training_flops


def benchmark_training(args: TrainBenchmark) -> dict[str, Any]:
    """Times every backend and the baseline.

    Raises:
        ValueError: a backend or the other package cannot run here.
    """
    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    steps: dict[str, Any] = {name: TransformerStep(args, name, device, precision) for name in args.backends}
    if args.baseline != "none":
        steps[args.baseline] = DallePytorchStep(args.config, args.batch_size, args.attn_types, device)
    executed = {name: _executed_flops(step, args.compile) for name, step in steps.items()}
    rounds = [{name: seconds_of(step, device) for name, step in steps.items()} for _ in range(args.rounds)]
    rate, peak = matmul_rate(device, precision), peak_flops(device, precision, args.peak_flops)
    tokens = args.batch_size * args.config.layout.seq_len
    results = {}
    for name, step in steps.items():
        seconds = median(times[name] for times in rounds)
        line = step.facts | {"flops_executed": executed[name], "seconds": seconds}
        line["tokens_per_sec"] = tokens / seconds
        if step.flops:
            line["matmul_utilization"] = step.flops / seconds / rate
        if step.flops and peak:
            line["mfu"] = step.flops / seconds / peak
        for other in {args.backends[0]: 0, args.baseline: 0}:
            if other in steps:
                line[f"speedup_vs_{other}"] = median(times[other] / times[name] for times in rounds)
        results[name] = line
    report = {
        "results": results,
        "tokens": tokens,
        "peak_flops": peak,
        "matmul_flops_per_second": rate,
        "compile": args.compile,
        "activation_checkpointing": args.activation_checkpointing,
        "peak_memory_gib": peak_memory(device),
    }
    return finish(report, args, device)


class TransformerStep(Stepper):
    """Our transformer with its optimizer; a call is one training step."""

    def __init__(self, args: TrainBenchmark, backend: str, device: torch.device, precision: str):
        changes = {"attention_backend": backend}
        if backend == "causal":
            changes = {"sparse": False, "attention_backend": "auto"}
        config = replace(args.config, **changes)
        super().__init__("transformer", config, TransformerObjective(), device, precision, args.compile)
        self.flops = args.batch_size * sum(training_flops(config).values())
        self.ids = random_ids(config.layout, args.batch_size).to(device)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.facts = {"parameters": parameters, "precision": precision, "flops": self.flops}
        self.facts["attention"] = self.model.backends()

    def __call__(self) -> None:
        super().__call__(self.ids)


def _executed_flops(step: Any, compiled: bool) -> int | None:
    """FLOPs of one step as torch counts them, which also warms it up; None for compiled code."""
    with nullcontext() if compiled else FlopCounterMode(display=False) as counter:
        step()
    return None if compiled else counter.get_total_flops()

"""Speed of a transformer's training step: attention backends, and DALLE-pytorch, in one run.

Every round times each contender once; medians of the rounds and of the ratios within a round are reported.
MFU is that of the training log (dalle/train/loggers.py).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from dalle.benchmarks.common import Stepper, finish, random_ids, time_rounds
from dalle.benchmarks.config import TrainBenchmark
from dalle.benchmarks.dalle_pytorch import DallePytorchStep
from dalle.compile import compile_layers
from dalle.planner.count import estimate_step
from dalle.planner.memory import ParallelLayout, memory
from dalle.train.config import TrainConfig
from dalle.train.loggers import peak_flops, peak_memory
from dalle.train.precision import resolve_device, resolve_precision
from dalle.transformer.objective import TransformerObjective, training_flops


def benchmark_train(args: TrainBenchmark) -> dict[str, Any]:
    """Times every backend and the baseline.

    Raises:
        ValueError: a backend or the other package cannot run here.
    """
    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    results, steps = {}, {}
    for name in args.backends:
        steps[name], results[name] = _transformer_step(args, name, device, precision)
    if args.baseline != "none":
        steps[args.baseline] = DallePytorchStep(args.config, args.batch_size, device)
        results[args.baseline] = steps[args.baseline].facts
    time_rounds(steps, 1, device)  # warm-up
    times = time_rounds(steps, args.rounds, device)
    peak = peak_flops(device, precision, args.peak_flops)
    tokens = args.batch_size * args.config.layout.seq_len
    for name, line in results.items():
        seconds = median(times[name])
        line |= {"seconds": seconds, "tokens_per_sec": tokens / seconds}
        if peak and "flops" in line:
            line["mfu"] = line["flops"] / seconds / peak
        for other in (args.backends[0], args.baseline):
            if other in steps:
                line[f"speedup_vs_{other}"] = median(times[other] / times[name])
    report = {
        "results": results,
        "tokens": tokens,
        "peak_flops": peak,
        "compile": args.compile,
        "activation_checkpointing": args.config.activation_checkpointing,
        "peak_memory_gib": peak_memory(device),
    }
    if args.plan:
        train = TrainConfig(batch_size=args.batch_size)
        step = estimate_step("transformer", args.config, args.batch_size, precision)
        planned = memory(step, ParallelLayout(train, "none", half=precision != "fp32"))
        report["planned_memory_gib"] = planned["peak"] / 2**30
    return finish(report, args.json, device)


def _transformer_step(
    args: TrainBenchmark, backend: str, device: torch.device, precision: str
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A training step of our transformer, and what is known of it."""
    config = replace(args.config, attention_backend="auto" if backend == "causal" else backend)
    if backend == "causal":
        config = replace(config, sparse=False)
    step = Stepper("transformer", config, TransformerObjective(), device, precision)
    if args.compile:
        compile_layers(step.model)
    facts = {
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "precision": precision,
        "flops": args.batch_size * sum(training_flops(config).values()),
        "attention": step.model.backends(),
    }
    return partial(step, random_ids(config.layout, args.batch_size).to(device)), facts

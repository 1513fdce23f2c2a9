"""How fast and how large: the training step of a transformer, backends side by side in one run.

Times on a shared machine swing, so every round times each backend once, and the medians of the rounds and of
the ratios within a round are reported.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.layout import TokenLayout
from dalle.models import build
from dalle.objectives import TransformerObjective
from dalle.train.ema import AveragedWeights, EMAConfig
from dalle.train.log import peak_memory
from dalle.train.loop import gradient_scales, train_step
from dalle.train.optim import OptimizerConfig, build_optimizers
from dalle.train.precision import Precision, compile_parts, resolve_device, resolve_precision
from dalle.train.schedules import Schedule
from dalle.train.state import TrainState, make_directory, write_json
from dalle.transformer import TransformerConfig
from dalle.transformer.sizes import SIZES, training_flops
from dalle.types import Objective


@dataclass(frozen=True)
class TrainBenchmark:
    """Times training steps of a transformer on random tokens."""

    size: str | None = None
    """A named size (tiny, 60m, 120m, 350m, 1.3b, 2.8b, 5.6b, 12b) instead of --model."""
    model: TransformerConfig = TransformerConfig(depth=8, heads=8)
    """Shape of the transformer; its backend is replaced by --backends."""
    backends: tuple[str, ...] = ("dense", "sdpa", "blocks")
    """Ways of computing attention to compare; ratios are against the first."""
    batch_size: int = 2
    """Streams in a step."""
    rounds: int = 5
    """Steps timed of each backend, after one that is not."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16; auto takes bf16 where the device has it in hardware."""
    compile: bool = False
    """Compile each layer."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""
    json: Path | None = None
    """File for the report; printed too."""

    def __post_init__(self):
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; expected one of {', '.join(SIZES)}")
        if min(self.batch_size, self.rounds) < 1 or not self.backends:
            raise ValueError("batch-size and rounds must be positive, and backends name at least one")

    @property
    def config(self) -> TransformerConfig:
        """The shape to time."""
        return SIZES[self.size] if self.size else self.model


def benchmark_training(run: TrainBenchmark) -> dict[str, Any]:
    """Times every backend; writes --json."""
    if run.json:
        make_directory(run.json.parent)
    device = resolve_device(run.device)
    precision = resolve_precision(run.precision, device)
    steppers = {backend: _stepper(run, backend, device, precision) for backend in run.backends}
    ids = random_ids(run.config.layout, run.batch_size).to(device)
    rounds = [
        {name: seconds(lambda step=step: step(ids), device) for name, step in steppers.items()}
        for _ in range(run.rounds + 1)
    ][1:]
    flops = {name: count * run.batch_size for name, count in training_flops(run.config).items()}
    rate = matmul_rate(device, precision)
    report = {
        "parameters": sum(p.numel() for p in next(iter(steppers.values())).state.model.parameters()),
        "tokens": run.batch_size * run.config.layout.length,
        "flops": flops,
        "matmul_flops_per_second": rate,
        "precision": precision,
        "backends": {name: _line(name, rounds, run, sum(flops.values()), rate) for name in steppers},
        "peak_memory_gib": peak_memory(device),
        "hardware": hardware(device),
    }
    if run.json:
        write_json(run.json, report)
    _print(report)
    return report


class Stepper:
    """A model with its optimizer; a call with a batch is one training step."""

    def __init__(self, kind: str, config: Any, objective: Objective, device: torch.device, precision: str):
        torch.manual_seed(0)
        model = build(kind, config).to(device)
        self.objective, self.precision = objective, precision
        self.optim = OptimizerConfig(lr=Schedule(1e-4, 1e-4), warmup=0)
        scales = gradient_scales(model) if precision == "fp16" else None
        self.state = TrainState(model, build_optimizers(model, self.optim), AveragedWeights(model, EMAConfig()), scales)

    def __call__(self, batch: Any) -> None:
        train_step(self.state, batch, self.objective, self.optim, self.precision, seed=0)


def _stepper(run: TrainBenchmark, backend: str, device: torch.device, precision: str) -> Stepper:
    config = replace(run.config, backend=backend)
    stepper = Stepper("transformer", config, TransformerObjective(), device, precision)
    if run.compile:
        compile_parts(stepper.state.model)
    return stepper


def random_ids(layout: TokenLayout, batch_size: int) -> Tensor:
    """Joint ids int64 (B, N) that mean nothing."""
    text = torch.randint(layout.text_vocab, (batch_size, layout.text_len))
    image = torch.randint(layout.image_vocab, (batch_size, layout.image_len))
    return layout.pack(text, image)


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, the device's work included."""
    _wait(device)
    started = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(name: str, rounds: list[dict[str, float]], run: TrainBenchmark, flops: int, rate: float) -> dict[str, float]:
    median = statistics.median(times[name] for times in rounds)
    return {
        "seconds": median,
        "tokens_per_second": run.batch_size * run.config.layout.length / median,
        "share_of_matmul_rate": flops / median / rate,
        f"times_as_fast_as_{run.backends[0]}": statistics.median(t[run.backends[0]] / t[name] for t in rounds),
    }


def matmul_rate(device: torch.device, precision: str, side: int = 2048) -> float:
    """Floating-point operations a second of a large matrix product here and now: the best of eight."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = [seconds(lambda: a @ a, device) for _ in range(8)]
    return 2 * side**3 / min(times)


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _print(report: dict[str, Any]) -> None:
    tera = sum(report["flops"].values()) / 1e12
    print(f"{report['parameters'] / 1e6:.1f}M parameters, {report['tokens']} tokens, {tera:.3f} TFLOP a step", end="")
    print(f", {report['precision']}, {report['hardware']}, peak {report['peak_memory_gib']} GiB")
    for name, line in report["backends"].items():
        shown = "  ".join(f"{key} {value:.4g}" for key, value in line.items())
        print(f"  {name:8}{shown}")

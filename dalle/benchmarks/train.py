"""How fast a training step of the transformer is: backends, and DALLE-pytorch, side by side in one run.

Times on a shared machine swing, so every round times each contender once, and the medians of the rounds and of
the ratios within a round are reported.

The utilisation, MFU, is that of training's log (dalle/train/throughput.py, by the operations of transformer/sizes.py).
The peak is the maker's, known or given as --peak-flops; beside it stands the share of what a large matrix product
reaches on the device in that run.
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle.benchmarks.common import Stepper, hardware, matmul_rate, save_report, seconds_of
from dalle.benchmarks.dalle_pytorch import MIX, DallePytorchStep
from dalle.io.files import make_directory
from dalle.nn.attention import CHOICES
from dalle.train.loggers import peak_memory
from dalle.train.precision import Precision, resolve_device, resolve_precision
from dalle.train.throughput import mfu, peak_flops
from dalle.transformer import TransformerConfig
from dalle.transformer.objective import TransformerObjective
from dalle.transformer.sizes import SIZES, training_flops

CONTENDERS = (*CHOICES, "causal")


@dataclass(frozen=True)
class TrainBenchmark:
    """Times training steps of a transformer on random tokens."""

    size: str | None = None
    """A named size (tiny, 60m, 120m, 350m, 1.3b, 2.8b, 5.6b, 12b) instead of --model."""
    model: TransformerConfig = TransformerConfig(depth=8, heads=8)
    """Shape of the transformer; its backend is replaced by --backends."""
    backends: tuple[str, ...] = ("dense", "sdpa", "blocks")
    """Ways of computing attention to compare (also flex, auto, and causal: the same without sparse layers);
    ratios are against the first."""
    against: Literal["none", "dalle-pytorch"] = "none"
    """Another package to time in the same run, in fp32 as it trains: dalle-pytorch 1.6.6, if it is installed."""
    attn_types: tuple[str, ...] = MIX
    """Kinds of that package's layers, repeated to the depth: axial_row, axial_col, conv_like or full."""
    batch_size: int = 2
    """Streams in a step."""
    rounds: int = 5
    """Steps timed of each contender, after one that is not."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16; auto takes bf16 where the device has it in hardware."""
    compile: bool = False
    """Compile each layer."""
    activation_checkpointing: bool = False
    """Compute the inside of each resblock again in the backward pass."""
    peak_flops: float | None = None
    """The device's peak FLOP/s in that precision, for the utilisation; known GPUs need none (dalle/train/throughput.py)."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""
    json: Path | None = None
    """File for the report; printed too."""

    def __post_init__(self):
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; expected one of {', '.join(SIZES)}")
        if min(self.batch_size, self.rounds) < 1 or not self.backends:
            raise ValueError("batch-size and rounds must be positive, and backends name at least one")
        if unknown := set(self.backends) - set(CONTENDERS):
            raise ValueError(f"unknown backend {min(unknown)!r}; expected one of {', '.join(CONTENDERS)}")
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ValueError(f"peak-flops must be positive, got {self.peak_flops}")

    @property
    def config(self) -> TransformerConfig:
        """The shape to time."""
        return replace(
            SIZES[self.size] if self.size else self.model,
            activation_checkpointing=self.activation_checkpointing,
        )


def benchmark_training(run: TrainBenchmark) -> dict[str, Any]:
    """Times every contender; writes --json.

    Raises:
        ValueError: a backend or the other package cannot run here.
    """
    if run.json:
        make_directory(run.json.parent)
    device = resolve_device(run.device)
    precision = resolve_precision(run.precision, device)
    steps: dict[str, Any] = {backend: OurStep(run, backend, device, precision) for backend in run.backends}
    if run.against == "dalle-pytorch":
        steps["dalle-pytorch"] = DallePytorchStep(run.config, run.batch_size, run.attn_types, device)
    executed = {name: _executed(step, run.compile) for name, step in steps.items()}
    rounds = [{name: seconds_of(step, device) for name, step in steps.items()} for _ in range(run.rounds)]
    rate, peak = matmul_rate(device, precision), peak_flops(device, precision, run.peak_flops)
    report = {
        "tokens": run.batch_size * run.config.layout.seq_len,
        "mfu": "flops / seconds / peak_flops",
        "peak_flops": peak,
        "matmul_flops_per_second": rate,
        "compile": run.compile,
        "activation_checkpointing": run.activation_checkpointing,
        "contenders": {
            name: step.facts()
            | {"flops_executed": executed[name]}
            | _speed(name, rounds, run, step.flops, rate, peak)
            for name, step in steps.items()
        },
        "peak_memory_gib": peak_memory(device),
        "hardware": hardware(device),
    }
    save_report(report, run.json)
    _print(report)
    return report


class OurStep:
    """A model with its optimizer; a call is one training step."""

    def __init__(self, run: TrainBenchmark, backend: str, device: torch.device, precision: str):
        changes = {"sparse": False, "backend": "auto"} if backend == "causal" else {"backend": backend}
        config = replace(run.config, **changes)
        self.step = Stepper("transformer", config, TransformerObjective(), device, precision, run.compile)
        self.model, layout = self.step.model, config.layout
        text = torch.randint(layout.text_vocab, (run.batch_size, layout.text_len))
        image = torch.randint(layout.image_vocab, (run.batch_size, layout.num_image_tokens))
        self.flops = run.batch_size * sum(training_flops(config).values())
        self.ids, self.precision = layout.pack(text, image).to(device), precision

    def __call__(self) -> None:
        self.step(self.ids)

    def facts(self) -> dict[str, Any]:
        """What is timed."""
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "precision": self.precision,
            "attention": self.model.backends(),
            "flops": self.flops,
        }


def _executed(step: Any, compiled: bool) -> int | None:
    """Operations of one step as torch counts them, which also warms it up; not counted in compiled code."""
    if compiled:
        step()
        return None
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def _speed(
    name: str,
    rounds: list[dict[str, float]],
    run: TrainBenchmark,
    flops: int | None,
    rate: float,
    peak: float | None,
) -> dict[str, Any]:
    """What the clock says; shares of a rate for those whose needed operations are known."""
    seconds = statistics.median(times[name] for times in rounds)
    ours = flops is not None
    rivals = [run.backends[0], *(["dalle-pytorch"] if ours and "dalle-pytorch" in rounds[0] else [])]
    return {
        "seconds": seconds,
        "tokens_per_sec": run.batch_size * run.config.layout.seq_len / seconds,
        **({"share_of_matmul_rate": flops / seconds / rate} if ours else {}),
        **({"mfu": mfu(flops, seconds, peak)} if ours and peak else {}),
        **{f"times_as_fast_as_{r}": statistics.median(t[r] / t[name] for t in rounds) for r in rivals},
    }


def _print(report: dict[str, Any]) -> None:
    print(
        f"{report['tokens']} tokens, {report['hardware']}, peak {report['peak_memory_gib']} GiB for all together"
    )
    for name, line in report["contenders"].items():
        shown = (
            f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in line.items()
        )
        print(f"  {name:14}{'  '.join(shown)}")

"""Parts that benchmarks share: a training step, a timer that synchronizes the device, reports."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.hub.registry import build_model
from dalle.io.files import make_directory, write_json
from dalle.layout import TokenLayout
from dalle.schedules import Schedule
from dalle.train.config import EMAConfig, OptimizerConfig
from dalle.train.grad_scaler import build_grad_scaler
from dalle.train.optimizer import build_optimizers
from dalle.train.state import EMA, TrainState
from dalle.train.step import train_step
from dalle.types import Loss, Objective

OPTIM = OptimizerConfig(lr=Schedule(1e-4, 1e-4), warmup_steps=0)  # of steps that are only timed


class Stepper:
    """A model with its optimizer; a call with a batch is one training step."""

    def __init__(
        self,
        kind: str,
        config: Any,
        objective: Objective,
        device: torch.device,
        precision: str,
        optim: OptimizerConfig = OPTIM,
        seed: int = 0,
    ):
        torch.manual_seed(seed)
        with device:
            self.model = model = build_model(kind, config).to(device)
        self.objective, self.precision, self.optim = objective, precision, optim
        scales = build_grad_scaler(model) if precision == "fp16" else None
        self.state = TrainState(model, build_optimizers(model, optim), EMA(model, EMAConfig()), scales)

    def __call__(self, batch: Any) -> Loss:
        return train_step(self.state, batch, self.objective, self.optim, self.precision, seed=0)[0]


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call; the device is synchronized before and after."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def time_rounds(work: dict[Any, Callable], rounds: int, device: torch.device) -> dict[Any, np.ndarray]:
    """Seconds of each call, float (rounds,); every round times each of them once."""
    times = [[seconds_of(call, device) for call in work.values()] for _ in range(rounds)]
    return dict(zip(work, np.array(times).T, strict=True))


def random_ids(layout: TokenLayout, batch_size: int) -> Tensor:
    """Random joint ids, int64 (B, N), every text position in use."""
    text = torch.randint(layout.text_vocab, (batch_size, layout.text_len))
    return layout.pack(text, torch.randint(layout.image_vocab, (batch_size, layout.num_image_tokens)))


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine and software of a report."""
    cpu = platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "system": platform.system(),
    }


def finish(report: dict[str, Any], json: Path | None, device: torch.device) -> dict[str, Any]:
    """Adds the hardware, prints a line for each of the results, and writes the report to a file, if any."""
    report["hardware"] = hardware(device)
    facts = {name: value for name, value in report.items() if not isinstance(value, dict)}
    lines = {"": facts, "hardware": report["hardware"], **report["results"]}
    width = max(map(len, lines))
    for name, line in lines.items():
        values = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()]
        print(f"  {name:{width}}", "  ".join(values))
    if json:
        make_directory(json.parent)
        write_json(json, report)
    return report

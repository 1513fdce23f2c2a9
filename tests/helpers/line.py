"""A line, y = w x + b, that trains in milliseconds."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle.schedules import Schedule
from dalle.train import TrainConfig, Trainer
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.config import EMAConfig, LogConfig, OptimizerConfig
from dalle.train.loggers import read_log
from dalle.train.optimizer import build_optimizers
from dalle.train.state import EMA, TrainState
from dalle.types import Loss

CONFIG = TrainConfig(
    batch_size=4,
    optimizer=OptimizerConfig(lr=Schedule(0.1, 0.1), warmup_steps=0),
    ema=EMAConfig(decay=0.9, update_every=1),
    precision="fp32",
    log_every=1,
    save_every=1,
    keep_last=2,
    max_skipped_steps=1,
)
CLOCKS = {"step_time", "data_time_frac", "max_memory_gib", "samples_per_sec", "tokens_per_sec"}


def squared_error(model: nn.Module, batch: Tensor, step: int) -> Loss:
    return Loss((model(batch) - 2 * batch - 0.1 * torch.randn_like(batch)).square().mean())


def fit_line(
    out: Path,
    steps: int,
    objective: Callable = squared_error,
    model: nn.Module | None = None,
    width: int = 1,
    config: dict | None = None,
    inputs: dict | None = None,
    evaluate: Callable | None = None,
    resume: str = "auto",
    log: LogConfig | None = None,
    **changes,
) -> TrainState:
    """Trains; `config` and `inputs` go into meta.json, `changes` into the training configuration."""
    torch.manual_seed(0)
    return Trainer(
        model or nn.Linear(width, width),
        objective,
        lambda step: torch.linspace(-1, 1, 4 * width).view(4, width) + step,
        replace(CONFIG, **changes),
        run_dir=out,
        meta={"kind": "line", "config": config or {}, "inputs": inputs or {}},
        steps=steps,
        evaluate=evaluate,
        resume=resume,
        log_config=log or LogConfig(),
    ).train()


def fresh_state() -> TrainState:
    model = nn.Linear(1, 1)
    return TrainState(model, build_optimizers(model, CONFIG.optimizer), EMA(model, CONFIG.ema))


def at_step(step: int, act: Callable[[], None]) -> Callable:
    """The objective, which acts in the middle of a step."""

    def objective(model: nn.Module, batch: Tensor, now: int) -> Loss:
        if now + 1 == step:
            act()
        return squared_error(model, batch, now)

    return objective


def power_cut() -> None:
    raise RuntimeError("power cut")


def send(name: str) -> None:
    """Sends a signal to this process."""
    os.kill(os.getpid(), getattr(signal, name))


def file_contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def newest_files(run: Path) -> dict[str, bytes]:
    """Every file of a run's newest checkpoint."""
    return file_contents(latest_checkpoint(run))


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def log_lines(run: Path, evaluations: bool = False) -> list[dict]:
    """The lines of training, or those of evaluations, without clocks and memory."""
    return [
        {name: value for name, value in line.items() if name not in CLOCKS}
        for line in read_log(run / "log.jsonl")
        if ("loss" not in line) == evaluations
    ]

"""Loggers of training metrics (log.jsonl, TensorBoard, Weights & Biases) and the throughput among them."""

import json
import math
import os
import re
import resource
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from dalle.io.files import write_text
from dalle.io.text import parse_json
from dalle.train.config import PEAK_FLOPS, LogConfig
from dalle.types import StepCost

Numbers = dict[str, float | list[float]]


def to_numbers(metrics: dict[str, Any]) -> Numbers:
    """Tensors and numbers as plain floats."""
    return {name: float(value) for name, value in metrics.items()}


class FileLogger:
    """run/log.jsonl, {"step": 10, "loss": ...} a line, and NAME-STEP.png.

    Opening at step k drops the lines that a crash left after k.
    """

    def __init__(self, run_dir: Path, step: int):
        self.run_dir, self.path = run_dir, run_dir / "log.jsonl"
        kept = [line for line in read_log(self.path) if line["step"] <= step] if self.path.exists() else []
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, numbers: Numbers) -> None:
        """Appends one line; numbers that are not finite, which JSON cannot hold, are left out."""
        finite = {name: x for name, x in numbers.items() if isinstance(x, list) or math.isfinite(x)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        image.save(self.run_dir / f"{name}-{step:08d}.png")

    def close(self) -> None: ...


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log; damaged ones are left out and their number printed."""
    lines: list[dict[str, float]] = []
    texts = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for text in texts:
        try:
            line = parse_json(text.strip("\0"), str(path))
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    if texts != [""] and len(lines) < len(texts):
        print(f"note: {path}: {len(texts) - len(lines)} damaged lines are left out")
    return lines


def peak_memory(device: torch.device | None = None) -> float:
    """Peak memory in GiB: of a CUDA device, else of this process alone."""
    if device is not None and device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    status = Path("/proc/self/status")  # Linux, where getrusage starts at the parent's peak
    if status.is_file() and (found := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return round(int(found[1]) / 2**20, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)


class Loggers:
    """All loggers of a run, none in other processes than the first; ImportError for a missing package."""

    def __init__(self, run_dir: Path, step: int, config: LogConfig, meta: dict[str, Any], is_main: bool):
        self.loggers: list[FileLogger | TensorBoard | WandB] = []
        if not is_main:
            return
        if "tensorboard" in config.loggers:
            self.loggers.append(TensorBoard(run_dir, step))
        if "wandb" in config.loggers:
            self.loggers.append(WandB(run_dir, config.project, meta))
        self.loggers.insert(0, FileLogger(run_dir, step))  # a line is on the disk before others can fail

    def write(self, step: int, numbers: Numbers) -> None:
        """Logs a step's metrics."""
        for logger in self.loggers:
            logger.write(step, numbers)

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """Writes NAME-STEP.png and logs it."""
        for logger in self.loggers:
            logger.log_image(step, name, image)

    def close(self) -> None:
        """Closes all loggers."""
        for logger in self.loggers:
            logger.close()


def min_and_max(numbers: Numbers) -> dict[str, float]:
    """A list, as the gradient scales, becomes NAME/min and NAME/max; text is left out."""
    plain: dict[str, float] = {}
    for name, value in numbers.items():
        if not isinstance(value, list):
            plain[name] = value
        elif not isinstance(value[0], str):
            plain |= {f"{name}/min": min(value), f"{name}/max": max(value)}
    return plain


class TensorBoard:
    """Event files in run/tensorboard: `tensorboard --logdir runs` shows them."""

    def __init__(self, run_dir: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError('no tensorboard: pip install "zeroshot-text2image[tensorboard]"') from None
        self.events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, numbers: Numbers) -> None:
        for name, value in min_and_max(numbers).items():
            self.events.add_scalar(name, value, step)
        self.events.flush()

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        self.events.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.events.close()


class WandB:
    """A run of Weights & Biases, resumed by its id in run/wandb-id.txt."""

    def __init__(self, run_dir: Path, project: str, meta: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ImportError('no wandb: pip install "zeroshot-text2image[wandb]"') from None
        self.image, name = wandb.Image, run_dir / "wandb-id.txt"
        if not name.exists():
            name.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        known = "WANDB_MODE" in os.environ or wandb.api.api_key
        self.run = wandb.init(
            project=project,
            name=run_dir.name,
            id=name.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
            config=meta.get("config"),
            mode=None if known else "offline",
        )

    def write(self, step: int, numbers: Numbers) -> None:
        self.run.log(min_and_max(numbers), step=step)

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        self.run.log({name: self.image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


def peak_flops(device: torch.device, precision: str, given: float | None = None) -> float | None:
    """Peak FLOP/s of a device: `given`, else by the GPU's name; None if unknown, and for fp32."""
    if given is not None or device.type != "cuda" or precision == "fp32":
        return given
    words = f" {torch.cuda.get_device_name(device)} ".replace("-", " ")
    return next((flops for gpu, flops in PEAK_FLOPS.items() if f" {gpu} " in words), None)


class ThroughputMeter:
    """Times the steps of a run, without evaluations and checkpoints.

    MFU, model FLOP/s utilization, is the FLOPs that the model needs / seconds / peak FLOP/s of the device.

    Args:
        device: whose peak memory is reported.
        processes: train together, each with as many samples.
        peak: FLOP/s of the device; without it there is no MFU.
    """

    def __init__(self, device: torch.device, processes: int = 1, peak: float | None = None):
        self.device, self.processes, self.peak = device, processes, peak
        self._reset()

    def _reset(self) -> None:
        self.started, self.steps = time.perf_counter(), 0
        self.seconds = {"waiting": 0.0, "paused": 0.0}

    @contextmanager
    def timed(self, kind: Literal["waiting", "paused"]) -> Iterator[None]:
        """Times waiting for a batch; or an evaluation or checkpoint, which is left out."""
        started = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - started

    def lap(self, cost: StepCost) -> Numbers:
        """Rates since the last lap: samples and tokens of all processes, memory and MFU of this device.

        `cost` is that of each of the `steps` in this process.
        """
        seconds = max(time.perf_counter() - self.started - self.seconds["paused"], 1e-9)
        steps_per_sec = self.steps / seconds
        numbers: Numbers = {
            "step_time": seconds / max(1, self.steps),
            "data_time_frac": self.seconds["waiting"] / seconds,
            "max_memory_gib": peak_memory(self.device),
        }
        if cost.samples:
            numbers["samples_per_sec"] = self.processes * cost.samples * steps_per_sec
        if cost.tokens:
            numbers["tokens_per_sec"] = self.processes * cost.tokens * steps_per_sec
        if cost.flops and self.peak:
            numbers["mfu"] = cost.flops * steps_per_sec / self.peak
        self._reset()
        return numbers

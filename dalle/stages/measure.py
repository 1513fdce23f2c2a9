"""What every benchmark needs: a clock that waits for the device, its rate at matrix products, its name."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dalle.train.state import make_directory, write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call, the device's queue emptied before and after."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a large matrix product here and now: the best of eight."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=DTYPES[precision])
    times = [seconds_of(lambda: a @ a, device) for _ in range(8)]
    return 2 * side**3 / min(times)


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    found = {"device": device.type, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return found | {"python": platform.python_version(), "cuda": torch.version.cuda, "system": platform.system()}


def save_report(report: dict[str, Any], path: Path | None) -> None:
    """JSON where a benchmark's --json says."""
    if path:
        make_directory(path.parent)
        write_json(path, report)

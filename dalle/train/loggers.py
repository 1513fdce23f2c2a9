"""What every run tells: a line of JSON per logged step (dalle/train/writers.py has what else may be told)."""

import json
import math
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from dalle.io.files import write_text

Numbers = dict[str, float | list[float]]


def to_numbers(metrics: dict[str, Any]) -> Numbers:
    """Tensors and numbers as plain floats."""
    return {name: float(value) for name, value in metrics.items()}


class JSONLLogger:
    """run/log.jsonl: {"step": 10, "loss": ...} a line. Opening at step k drops what a crash left after k."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [line for line in read_log(path) if line["step"] <= step] if path.exists() else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, numbers: Numbers) -> None:
        """Appends one line; numbers that are not finite, which JSON cannot hold, are left out."""
        finite = {
            name: value for name, value in numbers.items() if isinstance(value, list) or math.isfinite(value)
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")


class NullLogger:
    """The log of a process that is not the first: keeps nothing."""

    def write(self, step: int, numbers: Numbers) -> None:
        """Does nothing."""

    def log_image(self, step: int, name: str, image: Any) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log, up to the first that is none: one that broke off, or what another program wrote."""
    lines: list[dict[str, float]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def peak_memory(device: torch.device | None = None) -> float:
    """Largest memory so far in GiB: of a CUDA device, else of this process, without that of the one that started it."""
    if device is not None and device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    status = Path("/proc/self/status")  # Linux, where getrusage starts at the parent's peak
    if status.is_file() and (found := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return round(int(found[1]) / 2**20, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)

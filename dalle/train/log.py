"""What a run tells: a line of JSON per logged step, a progress bar, and names for what went wrong."""

import json
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle.train.shards import local

Numbers = dict[str, float | list[float]]


def to_numbers(metrics: dict[str, Any]) -> Numbers:
    """Tensors and numbers as plain floats."""
    return {name: float(value) for name, value in metrics.items()}


class JSONLines:
    """run/log.jsonl: {"step": 10, "loss": ...} a line. Opening at step k drops what a crash left after k."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [line for line in read_log(path) if line["step"] <= step] if path.exists() else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, numbers: Numbers) -> None:
        """Appends one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")


class Silence:
    """The log of a process that is not the first: keeps nothing."""

    def write(self, step: int, numbers: Numbers) -> None:
        """Does nothing."""


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log; a last line that broke off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
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


def first_nonfinite(model: nn.Module, forward) -> str:
    """Where NaN or infinity first appears: a parameter, else a module's output, else a gradient.

    Args:
        model: the model.
        forward: runs the failing step's forward pass again.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(local(parameter)).all():
            return f"parameter {name}"
    found: list[str] = []

    def watch(name: str):
        def hook(module, inputs, output):
            if not found and any(not torch.isfinite(t).all() for t in _tensors(output)):
                found.append(f"output of {name or 'the model'}")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all():
            return f"gradient of {name}"
    return "the loss itself"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)

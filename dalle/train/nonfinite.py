"""Updates that are not finite: skipped, counted, and the end of the run when too many come in a row.

A skipped update leaves weights, moments and averages as they were and counts as a step, so the next one has the
next batch. With gradient scales (fp16) it is part of the method: the paper skipped one update in twenty, and a
scale that is too large comes down only once in 125 updates. Elsewhere it is a bad batch, or a broken run.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dalle.train.scaling import PATIENCE
from dalle.train.shards import local


class Nonfinite:
    """Counts skipped updates.

    Args:
        limit: skipped updates in a row that end the run; 1 ends it at the first.
    """

    def __init__(self, limit: int):
        self.limit, self.skipped, self.in_a_row = limit, 0, 0

    def made(self) -> None:
        """An update was made."""
        self.in_a_row = 0

    def skip(self, scaled: bool) -> bool:
        """An update was skipped. Returns whether these are too many in a row.

        Args:
            scaled: the gradient scales may mend it. They move once in 125 updates, so 125 times as many may be.
        """
        self.skipped += 1
        self.in_a_row += 1
        return self.in_a_row >= self.limit * (PATIENCE if scaled else 1)

    def state_dict(self) -> dict[str, Tensor]:
        """No tensors."""
        return {}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """No tensors."""

    def numbers(self) -> dict[str, Any]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        """Puts them back."""
        self.skipped, self.in_a_row = numbers["skipped"], numbers["in_a_row"]


def first_nonfinite(
    model: nn.Module, forward: Callable[[], Any], all_true: Callable[[Tensor], Tensor] = lambda flag: flag
) -> str:
    """Where NaN or infinity first appears: a parameter, else a module's output, else a gradient.

    Each process names what it holds itself.

    Args:
        model: the model.
        forward: runs the failing step's forward pass again.
        all_true: whether a bool scalar is true in every process; they must all run `forward`, or none.
    """
    finite = {name: torch.isfinite(local(p)).all() for name, p in model.named_parameters()}
    bad = next((name for name, good in finite.items() if not good), None)
    if not all_true(torch.stack([*finite.values()]).all()):
        return f"parameter {bad}" if bad else "a parameter in another process's slice"
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

"""Non-finite losses and gradients: such steps are skipped and counted, and too many in a row end the run.

A skipped step leaves weights, moments and averages as they were and counts as a step, so the next one has the
next batch. With gradient scales (fp16) it is part of the method: the paper skipped one step in twenty, and a
scale that is too large is lowered once in 125 steps. Without them it is a bad batch, or a diverged run.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dalle.train.dtensor import local
from dalle.train.grad_scaler import BACKOFF_INTERVAL


class NonfiniteGuard:
    """Counts skipped steps.

    Args:
        limit: skipped steps in a row that end the run; 1 ends it at the first.
    """

    def __init__(self, limit: int):
        self.limit, self.skipped, self.in_a_row = limit, 0, 0

    def reset(self) -> None:
        """A step was not skipped."""
        self.in_a_row = 0

    def record_skip(self, scaled: bool) -> bool:
        """A step was skipped. Returns whether these are too many in a row.

        Args:
            scaled: lower gradient scales may help. They back off once in 125 steps, so the limit is 125 times
                as high.
        """
        self.skipped += 1
        self.in_a_row += 1
        return self.in_a_row >= self.limit * (BACKOFF_INTERVAL if scaled else 1)

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Loads what `state_dict` returned."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def find_nonfinite(
    model: nn.Module, forward: Callable[[], Any], all_true: Callable[[Tensor], Tensor] = lambda flags: flags
) -> str:
    """Where NaN or infinity first appears in any process: a parameter, else a module's output, else a
    gradient.

    Every process gives the same answer, also where another one holds what is bad.

    Args:
        model: the model.
        forward: runs the failing step's forward pass again.
        all_true: bool (flags,) -> which are true in every process; they must all run `forward`, or none.
    """
    parameters = dict(model.named_parameters())
    yes = torch.ones((), dtype=torch.bool, device=local(next(iter(parameters.values()))).device)
    if bad := _first_false(
        {f"parameter {name}": _finite([p], yes) for name, p in parameters.items()}, all_true
    ):
        return bad
    outputs: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(module, inputs, output):
            outputs[name] = outputs.get(name, yes) & _finite(_tensors(output), yes)

        return hook

    hooks = [
        module.register_forward_hook(watch(f"output of {name or 'the model'}"))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = {name: [] if p.grad is None else [p.grad] for name, p in parameters.items()}
    found = _first_false(outputs, all_true)
    found = found or _first_false(
        {f"gradient of {name}": _finite(g, yes) for name, g in gradients.items()}, all_true
    )
    return found or "the loss itself"


def _finite(tensors: Iterable[Tensor], yes: Tensor) -> Tensor:
    """bool scalar: whether all of these are, as far as this process holds them; `yes` for none."""
    return torch.stack([yes, *(torch.isfinite(local(tensor)).all() for tensor in tensors)]).all()


def _first_false(flags: dict[str, Tensor], all_true: Callable[[Tensor], Tensor]) -> str | None:
    """The first name, in their order, whose flag is false in any process."""
    together = all_true(torch.stack([*flags.values()])).tolist() if flags else []
    return next((name for name, good in zip(flags, together, strict=True) if not good), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)

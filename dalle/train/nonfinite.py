"""Non-finite losses and gradients: such steps are skipped and counted; too many in a row end the run.

A skipped step changes no weights, moments or averages, and the next step has the next batch. With gradient
scales (fp16) skipping is part of the method: the paper skipped one step in twenty.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dalle.train.dtensor import local
from dalle.train.grad_scaler import BACKOFF_INTERVAL


class NonfiniteGuard:
    """Counts skipped steps; `limit` in a row end the run."""

    def __init__(self, limit: int):
        self.limit, self.skipped, self.in_a_row = limit, 0, 0

    def reset(self) -> None:
        """A step was not skipped."""
        self.in_a_row = 0

    def record_skip(self, scaled: bool) -> bool:
        """Counts a skipped step; whether these are too many in a row.

        Gradient scales (`scaled`) are lowered once in 125 steps, so with them the limit is 125 times as high.
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
    """The first tensor that is not finite: a parameter, else a module's output, else a gradient.

    The answer is the same in every process, whichever has the bad tensor.

    Args:
        model: the model.
        forward: repeats the failing forward pass.
        all_true: bool (flags,) -> which are true in every process.
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
    """bool scalar: whether all shards on this process are finite; `yes` for none."""
    return torch.stack([yes, *(torch.isfinite(local(tensor)).all() for tensor in tensors)]).all()


def _first_false(flags: dict[str, Tensor], all_true: Callable[[Tensor], Tensor]) -> str | None:
    """The first name, in their order, whose flag is false in any process."""
    together = all_true(torch.stack([*flags.values()])).tolist() if flags else []
    return next((name for name, good in zip(flags, together, strict=True) if not good), None)


def _tensors(value: Any) -> list[Tensor]:
    leaves = tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

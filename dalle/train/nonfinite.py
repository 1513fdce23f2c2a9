"""Steps whose loss or gradient is not finite: counted on the device, and traced to the first bad tensor."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from dalle.train.distributed import Distributed, local


class NonfiniteGuard:
    """Counts skipped steps on the training's device, in all and in a row; `limit` in a row end the run.

    A GPU is not waited for: once the run is at its end every step is skipped, until the host looks.
    """

    def __init__(self, limit: int, device: torch.device | str = "cpu"):
        self.limit = limit
        self.skipped, self.in_a_row = torch.zeros(2, dtype=torch.int64, device=device)
        self.ended = torch.zeros((), dtype=torch.bool, device=device)

    def admit(self, finite: Tensor, loss: Tensor, patience: int = 1) -> Tensor:
        """Counts a step; bool (), whether it is made.

        Args:
            finite: bool (), of its loss and gradient.
            loss: its loss.
            patience: of gradient scales, which come down slowly: the limit is as many times as high where the
                loss is finite.
        """
        made = finite & ~self.ended
        self.skipped = self.skipped + ~made
        self.in_a_row = (self.in_a_row + ~finite) * ~made
        limit = self.limit * (1 + (patience - 1) * loss.detach().isfinite())
        self.ended = self.ended | (self.in_a_row >= limit)
        return made

    def at_end(self, look: bool = True) -> bool:
        """Whether the run is at its end; a GPU is asked, and waited for, only to `look`."""
        return (look or self.ended.device.type == "cpu") and bool(self.ended.cpu().numpy())

    def state_dict(self) -> dict[str, int]:
        return {"skipped": int(self.skipped), "in_a_row": int(self.in_a_row)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = torch.full_like(self.skipped, state["skipped"])
        self.in_a_row = torch.full_like(self.in_a_row, state["in_a_row"])


def find_nonfinite(model: nn.Module, forward: Callable[[], Any], dist: Distributed) -> str:
    """The first tensor that is not finite in any process: a parameter, a module's output or a gradient.

    `forward` repeats the failing forward pass.
    """
    parameters = dict(model.named_parameters())
    yes = torch.ones((), dtype=torch.bool, device=local(next(iter(parameters.values()))).device)

    def finite(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([yes, *(torch.isfinite(local(tensor)).all() for tensor in tensors)]).all()

    def first_bad(flags: dict[str, Tensor]) -> str | None:
        together = dist.all_true(torch.stack([*flags.values()])).tolist() if flags else []
        return next((name for name, good in zip(flags, together, strict=True) if not good), None)

    if bad := first_bad({f"parameter {name}": finite([p]) for name, p in parameters.items()}):
        return bad
    names, outputs = {module: name or "the model" for name, module in model.named_modules()}, {}

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if name := names.get(module):
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            outputs[f"output of {name}"] = outputs.get(f"output of {name}", yes) & finite(tensors)

    with register_module_forward_hook(watch), torch.no_grad():
        forward()
    gradients = {
        f"gradient of {n}": finite([] if p.grad is None else [p.grad]) for n, p in parameters.items()
    }
    return first_bad(outputs) or first_bad(gradients) or "the loss itself"

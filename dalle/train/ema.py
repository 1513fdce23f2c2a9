"""EMA of the weights (appendices A.2, B.2), corrected for its start at zero.

After n updates with decay d the plain average still holds the fraction d^n of its initial value: 67 % after
1,000 steps with an update every 25 and decay 0.99. So the sum starts at 0 and is divided by 1 - d^n.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dalle.train.config import EMAConfig


class EMA:
    """The running sum of a model's trainable parameters, by name; one that is frozen is its own average."""

    def __init__(self, model: nn.Module, config: EMAConfig):
        self.config = config
        self.updates = 0
        self.sums = {
            name: self._moved(torch.zeros_like(p)) for name, p in model.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After update `step` (counted from 1): takes the weights in if it is their turn."""
        if step % self.config.update_every == 0:
            self.updates += 1
            weights = [self._moved(p.detach()) for name, p in model.named_parameters() if name in self.sums]
            torch._foreach_lerp_(list(self.sums.values()), weights, 1 - self.config.decay)

    def _moved(self, tensor: Tensor) -> Tensor:
        """Where the average is kept; the copy is waited for."""
        return tensor if self.config.device == "same" else tensor.to(self.config.device)

    def averaged(self) -> dict[str, Tensor]:
        """The corrected averages; empty before the first update."""
        return bias_corrected(self.sums, self.config.decay, self.updates)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the averages inside the block and its own weights after it."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        _assign(model, self.averaged())
        try:
            yield
        finally:
            _assign(model, own)


def bias_corrected(sums: dict[str, Tensor], decay: float, updates: int) -> dict[str, Tensor]:
    """Sums divided by 1 - decay^updates; empty without updates."""
    return {name: s / (1 - decay**updates) for name, s in sums.items()} if updates else {}


@torch.no_grad()
def _assign(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.copy_(values[name])

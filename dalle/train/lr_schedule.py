"""The learning rate is halved whenever the training loss plateaus, five times at most (appendix B.2).

The paper does not say what a plateau is. Here the losses of `window` updates make one reading, their mean; when
`patience` readings in a row are not lower than the best one by `gain`, the learning rate is halved.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PlateauConfig:
    """When the learning rate is halved; the number of halvings is the transformer's (B.2), the rest our choice."""

    halvings: int = 5
    """Halvings at most (B.2): the last learning rate is 1/32 of the first. 0 never halves."""
    window: int = 2000
    """Updates whose mean loss makes one reading."""
    patience: int = 5
    """Readings in a row without a better one that make a plateau."""
    gain: float = 0.002
    """How far below the best a reading must lie to be better, in units of the loss."""

    def __post_init__(self):
        if self.halvings < 0 or min(self.window, self.patience) < 1 or not self.gain >= 0:
            raise ValueError(
                f"halvings and gain cannot be negative, window and patience must be positive, got {self}"
            )


NEVER = PlateauConfig(halvings=0)
"""The learning rate follows its schedule alone."""


class ReduceLROnPlateau:
    """Watches the training loss; `factor` is what the learning rate is multiplied by."""

    def __init__(self, config: PlateauConfig):
        self.config = config
        self.total, self.seen = 0.0, 0  # of the reading in hand
        self.best, self.waited, self.halved = float("inf"), 0, 0

    @property
    def factor(self) -> float:
        """1, 1/2, 1/4 and so on."""
        return 0.5**self.halved

    def see(self, loss: float) -> None:
        """Takes in the loss of an update that was made, the same number in every process."""
        if self.halved == self.config.halvings:
            return
        self.total += loss
        self.seen += 1
        if self.seen == self.config.window:
            self._read(self.total / self.seen)
            self.total, self.seen = 0.0, 0

    def _read(self, loss: float) -> None:
        if loss < self.best - self.config.gain:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited == self.config.patience:
            self.halved, self.waited = self.halved + 1, 0

    def state_dict(self) -> dict[str, Tensor]:
        """No tensors."""
        return {}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """No tensors."""

    def numbers(self) -> dict[str, Any]:
        """All that changes; without a best reading yet, None (JSON has no infinity)."""
        best = None if self.best == float("inf") else self.best
        return {
            "total": self.total,
            "seen": self.seen,
            "best": best,
            "waited": self.waited,
            "halved": self.halved,
        }

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        """Puts it back."""
        self.total, self.seen = numbers["total"], numbers["seen"]
        self.best = float("inf") if numbers["best"] is None else numbers["best"]
        self.waited, self.halved = numbers["waited"], numbers["halved"]

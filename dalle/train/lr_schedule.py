"""Reduction of the learning rate when the training loss plateaus: halved, five times at most (appendix B.2).

The paper does not define a plateau. Here the mean loss of `window` steps makes one reading; when `patience`
readings in a row are not lower than the best one by `threshold`, the learning rate is halved.
"""

import math
from typing import Any

from dalle.train.config import PlateauConfig


class ReduceLROnPlateau:
    """Watches the training loss; `factor` multiplies the learning rate."""

    def __init__(self, config: PlateauConfig):
        self.config = config
        self.total, self.count = 0.0, 0  # of the current reading
        self.best, self.bad_readings, self.reductions = math.inf, 0, 0

    @property
    def factor(self) -> float:
        """1, 1/2, 1/4 and so on."""
        return 0.5**self.reductions

    def step(self, loss: float) -> None:
        """Adds the loss of an update, the same number in every process."""
        if self.reductions == self.config.max_reductions:
            return
        self.total, self.count = self.total + loss, self.count + 1
        if self.count == self.config.window:
            self._read(self.total / self.count)
            self.total, self.count = 0.0, 0

    def _read(self, loss: float) -> None:
        if loss < self.best - self.config.threshold:
            self.best, self.bad_readings = loss, 0
            return
        self.bad_readings += 1
        if self.bad_readings == self.config.patience:
            self.reductions, self.bad_readings = self.reductions + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """All that changes; no best reading yet is None (JSON has no infinity)."""
        state = {key: value for key, value in vars(self).items() if key != "config"}
        return state | {"best": None if math.isinf(self.best) else self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        vars(self).update(state | {"best": math.inf if state["best"] is None else state["best"]})

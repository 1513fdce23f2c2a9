"""Values that change with the step (paper appendices A.2 and B.2)."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """From `start` to `end` over `steps` updates, then `end` for good."""

    start: float
    """Value at update 0."""
    end: float
    """Value from update `steps` on."""
    steps: int = 1
    """Updates that the change takes."""
    shape: Literal["cosine", "linear"] = "cosine"
    """Half a cosine wave (A.2) or a straight line."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"a schedule needs at least 1 step, got {self.steps}")

    def __call__(self, step: int) -> float:
        """The value at an update, counted from 0."""
        done = min(max(step / self.steps, 0.0), 1.0)
        share = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * share

"""Schedules of the learning rate and of the loss weights over steps (appendices A.2, B.2)."""

import math
from typing import Literal

from dalle.config import configuration


@configuration
class Schedule:
    """From `initial` to `final` over `decay_steps` steps, then constant."""

    initial: float
    """Value at step 0."""
    final: float
    """Value from step `decay_steps` on."""
    decay_steps: int = 1
    """Steps that the change takes."""
    shape: Literal["cosine", "linear"] = "cosine"
    """Half a cosine wave (A.2) or a straight line."""

    def __post_init__(self):
        if self.decay_steps < 1:
            raise ValueError(f"decay_steps must be positive, got {self.decay_steps}")

    def __call__(self, step: int) -> float:
        """Value at a step, counted from 0."""
        done = min(max(step / self.decay_steps, 0.0), 1.0)
        share = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        return self.initial + (self.final - self.initial) * share

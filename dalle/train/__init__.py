"""One training loop for every family: it receives an objective and knows no model."""

from dalle.train.loop import TrainConfig, fit
from dalle.train.schedules import Schedule

__all__ = ["Schedule", "TrainConfig", "fit"]

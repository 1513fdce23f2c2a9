"""One training loop for every family: it receives an objective and knows no model."""

from dalle.schedules import Schedule
from dalle.train.trainer import TrainConfig, fit

__all__ = ["Schedule", "TrainConfig", "fit"]

"""What the commands share: their inputs, batches and trainings, under runs/."""

from pathlib import Path

ROOT = Path("runs")

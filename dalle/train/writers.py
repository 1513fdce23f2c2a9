"""Where a run tells what it does: log.jsonl and images in its directory always, TensorBoard and W&B if asked."""

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dalle.train.loggers import JSONLLogger, Numbers

KINDS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class LogConfig:
    """What a run tells and where; changes nothing in what it does."""

    to: tuple[str, ...] = ()
    """Beside log.jsonl: tensorboard, wandb or both. W&B stays offline unless you are logged in."""
    project: str = "dalle"
    """Project of W&B."""
    peak_flops: float | None = None
    """The device's peak FLOP/s in the run's precision, for the utilisation; known GPUs need none."""

    def __post_init__(self):
        if unknown := sorted(set(self.to) - set(KINDS)):
            raise ValueError(
                f"unknown log {unknown[0]!r}; expected tensorboard or wandb (log.jsonl is always written)"
            )
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ValueError(f"peak_flops must be positive, got {self.peak_flops}")


class Logger(Protocol):
    """One place beside the run's directory."""

    def write(self, step: int, numbers: Numbers) -> None: ...

    def log_image(self, step: int, name: str, image: Image.Image) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """All places of a run.

    Args:
        run_dir: receives log.jsonl and NAME-STEP.png.
        step: where the run stands; what a crash left after it is dropped.
        config: the other places.
        meta: what describes the run.

    Raises:
        ImportError: a package is not there; says how to install it.
    """

    def __init__(self, run_dir: Path, step: int, config: LogConfig, meta: dict[str, Any]):
        self.run_dir = run_dir
        self.writers: list[Logger] = []
        if "tensorboard" in config.to:
            self.writers.append(TensorBoard(run_dir, step))
        if "wandb" in config.to:
            self.writers.append(WandB(run_dir, config.project, meta))
        self.lines = JSONLLogger(run_dir / "log.jsonl", step)

    def write(self, step: int, numbers: Numbers) -> None:
        """Numbers of a step."""
        self.lines.write(step, numbers)
        for writer in self.writers:
            writer.write(step, spread(numbers))

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """An image of a step."""
        image.save(self.run_dir / f"{name}-{step:08d}.png")
        for writer in self.writers:
            writer.log_image(step, name, image)

    def close(self) -> None:
        """Everything is written."""
        for writer in self.writers:
            writer.close()


def spread(numbers: Numbers) -> dict[str, float]:
    """Plain numbers only: of a list, as the gradient scales, the least and the largest."""
    plain: dict[str, float] = {}
    for name, value in numbers.items():
        plain |= (
            {f"{name}/least": min(value), f"{name}/most": max(value)}
            if isinstance(value, list)
            else {name: value}
        )
    return plain


class TensorBoard:
    """Event files in run/tensorboard: `tensorboard --logdir runs` shows them."""

    def __init__(self, run_dir: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                '--log.to tensorboard needs it: pip install "zeroshot-text2image[tensorboard]"'
            ) from None
        self.events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """A point of each curve."""
        for name, value in numbers.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()  # a run may die at any instant

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """An image under its name."""
        self.events.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Flushes."""
        self.events.close()


class WandB:
    """A run of Weights & Biases; resuming goes on with the same one, whose id lies in run/wandb-id.txt."""

    def __init__(self, run_dir: Path, project: str, meta: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ImportError('--log.to wandb needs it: pip install "zeroshot-text2image[wandb]"') from None
        self.image, name = wandb.Image, run_dir / "wandb-id.txt"
        if not name.exists():
            name.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        known = "WANDB_MODE" in os.environ or wandb.api.api_key
        self.run = wandb.init(
            project=project,
            name=run_dir.name,
            id=name.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
            config=meta.get("run"),
            mode=None if known else "offline",
        )

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """A point of each curve."""
        self.run.log(numbers, step=step)

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """An image under its name."""
        self.run.log({name: self.image(image)}, step=step)

    def close(self) -> None:
        """Waits until all is written."""
        self.run.finish()

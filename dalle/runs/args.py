"""Arguments shared by the training commands."""

from dataclasses import dataclass, field
from pathlib import Path

from dalle.config import RESUME_FREE
from dalle.train.config import TIMEOUT_MINUTES, LogConfig, Mode, Resume

ROOT = Path("runs")


@dataclass(frozen=True)
class TrainArgs:
    """Arguments of every training command."""

    out: Path | None = field(default=None, metadata=RESUME_FREE)
    """Directory of the run; default: runs/<stage>."""
    steps: int = field(default=430_000, metadata=RESUME_FREE)
    """Steps in all; schedules have their own lengths."""
    seed: int = 0
    """Seed of weights, data order and noise."""
    device: str = field(default="auto", metadata=RESUME_FREE)
    """cuda, mps or cpu; auto takes the first that is available."""
    resume: Resume = field(default="auto", metadata=RESUME_FREE)
    """auto: resume the run in --out; changed: resume it with the new configuration (the EMA decay excepted);
    never: refuse a directory that holds a run."""
    parallel: Mode = field(default="none", metadata=RESUME_FREE)
    """Data parallelism of the processes that torchrun starts: none is one process, ddp replicates the model,
    fsdp shards it, hsdp shards it within a machine and replicates it between machines."""
    shard: int | None = field(default=None, metadata=RESUME_FREE)
    """For hsdp: processes that share one set of parameters; default: those of a machine."""
    init_from: Path | None = field(default=None, metadata=RESUME_FREE)
    """Start from a run, checkpoint or model directory of the same family; vocabularies may grow."""
    freeze: tuple[str, ...] = ()
    """Names of parameters that are not trained; * matches anything: "layers.0.*"."""
    overfit_batch: int | None = None
    """Train on the first batch of this many samples again and again: a check that the loss can fall."""
    dist_timeout_minutes: float = field(default=TIMEOUT_MINUTES, metadata=RESUME_FREE)
    """Longest wait for the other processes before a run ends with an error."""
    compile: bool = field(default=False, metadata=RESUME_FREE)
    """Compile each layer: minutes at the start, faster steps."""
    log: LogConfig = field(default=LogConfig(), metadata=RESUME_FREE)
    """Loggers besides log.jsonl."""

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        for name in ("steps", "overfit_batch", "dist_timeout_minutes", "eval_samples"):
            value = getattr(self, name, None)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

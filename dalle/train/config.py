"""Training configuration: optimizer, EMA, precision, PowerSGD, logging; the defaults are the transformer's
(B.2).

A field marked `RESUME_FREE` may change when a run resumes: it leaves the weights as they are.
"""

import re
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from dalle.config import RESUME_FREE, check_positive, configuration, to_dict
from dalle.schedules import Schedule

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Mode = Literal["none", "ddp", "fsdp", "hsdp"]
Resume = Literal["auto", "changed", "never"]
POWERSGD_RANKS = {1920: 512, 2688: 640, 3968: 896}
"""Width -> rank (Table 1): the least multiple of 128 that leaves no gap in the training loss."""
PEAK_FLOPS = {  # dense, 16 bit with fp32 sums, by the data sheets; the first match wins
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
TIMEOUT_MINUTES = 15.0
"""Longest wait for the other processes in a step: longer than a data worker may take (10 minutes)."""
VARIANCE_CHUNK = 2**26  # elements of the second moment that are clipped at once, at most


@configuration
class PlateauConfig:
    """When the learning rate is halved; `max_reductions` is the paper's (B.2), the rest our choice."""

    max_reductions: int = 5
    """Most halvings (B.2): the last learning rate is 1/32 of the first. 0 never halves."""
    window: int = 2000
    """Steps whose mean loss makes one reading."""
    patience: int = 5
    """Readings in a row without an improvement that make a plateau."""
    threshold: float = 0.002
    """How far below the best a reading must be to count as an improvement, in units of the loss."""

    def __post_init__(self):
        if self.max_reductions < 0 or min(self.window, self.patience) < 1 or not self.threshold >= 0:
            raise ValueError(
                f"max_reductions and threshold cannot be negative, window and patience below 1, got {self}"
            )


NO_PLATEAU = PlateauConfig(max_reductions=0)
"""The learning rate follows its schedule alone."""


@configuration
class OptimizerConfig:
    """AdamW, optionally with Muon; the defaults are the transformer's (B.2)."""

    lr: Schedule = Schedule(4.5e-4, 4.5e-4)
    """Learning-rate schedule."""
    warmup_steps: int = 5000
    """Steps over which the learning rate rises linearly from 0 (B.2)."""
    plateau: PlateauConfig = PlateauConfig()
    """Halving of the learning rate when the training loss stops falling (B.2)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.96
    """Decay of the second moment (B.2)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 4.5e-2
    """Decoupled weight decay, on matrices only: not on gains, biases and embeddings (B.2)."""
    max_grad_norm: float | None = 4.0
    """Largest global gradient norm (B.2); null does not clip."""
    max_variance: float | None = 5.0
    """Largest second moment, not bias-corrected, before it is used (B.2); null does not clip."""
    state_dtype: Literal["fp32", "8bit", "paper"] = "fp32"
    """How AdamW stores both moments of matrices: fp32; paper: rounded to 1-6-9 and 0-6-10, emulated (B.2); or
    8bit: by torchao, which needs max_variance null. Gains, biases and embeddings always use fp32 (D,
    guideline 2)."""
    muon_lr_scale: float | None = None
    """Muon's learning rate over AdamW's, for the matrices of the layers; null leaves them to AdamW (B.2)."""

    def __post_init__(self):
        if min(self.lr.initial, self.lr.final) < 0 or self.warmup_steps < 0:
            raise ValueError(f"lr and warmup_steps cannot be negative, got {self.lr} and {self.warmup_steps}")
        for name in ("beta1", "beta2", "eps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative, got {getattr(self, name)}")
        check_positive(self, "max_grad_norm", "max_variance", "muon_lr_scale")
        if self.max_variance is not None and not 0 < self.beta2 < 1:
            raise ValueError(f"beta2 must be in (0, 1) with max_variance, got {self.beta2}")
        if self.state_dtype == "8bit" and self.max_variance is not None:
            raise ValueError("8-bit moments cannot be clipped: set optimizer.max_variance to null with them")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self.lr(step) * (min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0)


@configuration
class EMAConfig:
    """Exponential moving average of the weights; the defaults are the transformer's (B.2)."""

    decay: float = 0.99
    """Weight of the old average."""
    update_every: int = 25
    """Steps between two updates of the average."""
    device: Literal["same", "cpu"] = "same"
    """Where the average is stored: same as the weights, or cpu, as the paper's (B.2)."""

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        check_positive(self, "update_every")


@configuration
class PowerSGDConfig:
    """How replicas average their gradients (2.5); without replicas it has no effect."""

    rank: int | None = None
    """Of all shards of a matrix together: 896 for 12 billion parameters (Table 1); null sends whole
    gradients."""
    start_step: int = 0
    """First step whose gradients are factored; earlier ones are sent whole."""
    q_mode: Literal["fixed", "warm_start", "random"] = "fixed"
    """The matrix Q: fixed (the paper), the previous step's Q' (warm_start), or random in each step."""
    message_dtype: Literal["fp32", "paper"] = "fp32"
    """Of error buffers and messages: paper rounds them to 1-6-9, emulated (E.2)."""

    def __post_init__(self):
        check_positive(self, "rank")
        if self.start_step < 0:
            raise ValueError(f"start_step cannot be negative, got {self.start_step}")


def compression_rate(width: int, rank: int, shards: int = 8) -> float:
    """Share of the gradients of the layers' matrices that is not sent (Table 2): 1 - 5 r / 8 d for 8
    shards."""
    return 1 - rank * (shards + 2) / (2 * width * shards)


@configuration
class LogConfig:
    """Loggers; no effect on the training."""

    loggers: tuple[str, ...] = ()
    """Besides log.jsonl: tensorboard, wandb or both. W&B stays offline without a login."""
    project: str = "dalle"
    """W&B project."""
    peak_flops: float | None = None
    """Peak FLOP/s of the device in the run's precision, for MFU; default: known for common GPUs."""

    def __post_init__(self):
        if unknown := sorted(set(self.loggers) - {"tensorboard", "wandb"}):
            raise ValueError(f"unknown logger {unknown[0]!r}; expected tensorboard or wandb")
        check_positive(self, "peak_flops")


@configuration
class TrainConfig:
    """How a model is trained; the defaults are the transformer's (B.2)."""

    batch_size: int = 1024
    """Samples in a step, over all processes (B.2)."""
    grad_accum_steps: int = field(default=1, metadata=RESUME_FREE)
    """Forward and backward passes in a step of each process: less memory, the same loss and gradient."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, or Muon and AdamW."""
    ema: EMAConfig = EMAConfig()
    """Average of the weights."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16 (autocast; fp16 with a gradient scale per resblock of the transformer, 2.4, and one
    scale on the loss of a dVAE or CLIP), or auto: bf16 where the device has it in hardware, else fp32."""
    tf32: bool = True
    """TF32 for fp32 matrix products on CUDA; convolutions, CLIP's cosines and all that makes tokens never use
    it."""
    powersgd: PowerSGDConfig = PowerSGDConfig()
    """How replicas average their gradients (2.5)."""
    log_every: int = field(default=10, metadata=RESUME_FREE)
    """Steps between two lines of the log."""
    eval_every: int = 1000
    """Steps between two evaluations; the last step is always evaluated."""
    save_every: int = field(default=1000, metadata=RESUME_FREE)
    """Steps between two checkpoints; the last step is always saved."""
    max_skipped_steps: int = 8
    """Steps in a row, skipped because loss or gradient is not finite, that end the run; 1 ends it at the
    first. The paper skipped 5 % (E.2): 8 in a row are no chance. In fp16, where only the gradient is not
    finite, 125 times as many, since a scale is lowered once in 125 steps (D)."""
    keep_last: int = field(default=2, metadata=RESUME_FREE)
    """Newest checkpoints kept; the disk needs space for one more while it is written."""
    keep_every: int | None = field(default=None, metadata=RESUME_FREE)
    """Also keep each checkpoint whose step this divides; null keeps the newest only."""

    def __post_init__(self):
        check_positive(self, "batch_size", "grad_accum_steps", "log_every", "eval_every", "save_every")
        check_positive(self, "keep_last", "keep_every", "max_skipped_steps")
        if self.keep_every and self.keep_every % self.save_every:
            raise ValueError(f"keep_every {self.keep_every} is no multiple of save_every {self.save_every}")


@configuration
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
    profile: str | None = field(default=None, metadata=RESUME_FREE)
    """Steps to profile, FIRST:LAST, such as 10:13: writes <out>/profile-10-13.json, a Chrome trace, and
    profile-10-13.txt, a table of the ten longest operations."""

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        check_positive(self, "steps", "overfit_batch", "dist_timeout_minutes")
        if self.profile is not None:
            profile_steps(self.profile)


def profile_steps(text: str | None) -> tuple[int, int]:
    """The first and last step of FIRST:LAST; (0, 0) for None. ValueError for anything else."""
    if text is None:
        return 0, 0
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"profile must be FIRST:LAST, two steps from 1 on, such as 10:13; got {text!r:.80}")
    return first, last


def resume_fingerprint(config: Any) -> dict[str, Any]:
    """The configuration as a plain dict, without the fields that a resumed run may change (`RESUME_FREE`)."""
    classes = [cls for cls in type(config).__mro__ if is_dataclass(cls)]
    free = {f.name for cls in classes for f in fields(cls) if f.metadata.get("resume") == "free"}
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in free}
    return {name: resume_fingerprint(x) if is_dataclass(x) else to_dict(x) for name, x in values.items()}

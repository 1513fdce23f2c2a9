"""AdamW with the paper's groups: weight decay on matrices only, the running variance bounded (appendices A.2, B.2).

Short runs may leave the matrices of the layers to Muon (Jordan et al. 2024), which makes the singular values
of an update equal; at the size of the quick start it needs fewer steps than AdamW (docs/log.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dalle.schedules import Schedule
from dalle.train.float_formats import store_moments
from dalle.train.lr_schedule import PlateauConfig
from dalle.train.moments import adamw_8bit

AT_ONCE = 2**26
"""Elements of the variance bounded at once: what that needs beside it stays small."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and Muon if asked; the defaults are the transformer's (B.2)."""

    lr: Schedule = Schedule(4.5e-4, 4.5e-4)
    """Learning rate."""
    warmup: int = 5000
    """Updates over which the learning rate rises linearly from 0 (B.2)."""
    plateau: PlateauConfig = PlateauConfig()
    """Halving of the learning rate when the training loss stops falling (B.2)."""
    beta1: float = 0.9
    """Decay of the running mean."""
    beta2: float = 0.96
    """Decay of the running variance (B.2)."""
    eps: float = 1e-8
    """Added to the root of the variance."""
    weight_decay: float = 4.5e-2
    """Multiplier, on matrices only: not on gains, biases and embeddings (B.2)."""
    clip: float | None = 4.0
    """Largest global norm of the gradient (B.2); None does not clip."""
    variance_clip: float | None = 5.0
    """Largest running variance, not corrected for its start, before it is used (B.2); None does not clip."""
    moments: Literal["fp32", "8bit", "paper"] = "fp32"
    """How AdamW keeps mean and variance of matrices: fp32; paper: rounded to 1-6-9 and 0-6-10, emulated (B.2); or
    8bit: in 8 bits by torchao, which needs variance_clip null. Gains, biases and embeddings always have fp32 (D,
    guideline 2)."""
    muon: float | None = None
    """Learning rate of Muon over AdamW's, for the matrices of the layers; None gives them to AdamW (B.2)."""

    def __post_init__(self):
        if min(self.lr.start, self.lr.end) < 0 or self.warmup < 0:
            raise ValueError(
                f"learning rates and warmup cannot be negative, got {self.lr} and warmup {self.warmup}"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or null not to clip, got {self.clip}")
        if self.variance_clip is not None and not (self.variance_clip > 0 and 0 < self.beta2 < 1):
            raise ValueError(
                f"variance_clip and beta2 must be positive, or variance_clip null, "
                f"got {self.variance_clip} and {self.beta2}"
            )
        if self.moments == "8bit" and self.variance_clip is not None:
            raise ValueError(
                "8-bit moments cannot be clipped: set optimizer.variance_clip to null (None) with them"
            )
        if self.muon is not None and not self.muon > 0:
            raise ValueError(f"muon must be positive, or null for AdamW alone, got {self.muon}")

    def rate(self, step: int) -> float:
        """Learning rate of an update, counted from 0."""
        return self.lr(step) * (min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0)


def decay_groups(model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(name, parameter) of matrices and convolutions, and of gains, biases and embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        embedding = id(parameter) in embeddings or name.endswith(
            "embedding"
        )  # open_clip's are bare parameters
        matrix = parameter.ndim >= 2 and not embedding
        (decay if matrix else keep).append((name, parameter))
    return decay, keep


def hidden_matrices(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter) of the matrices in stacks of layers: not embeddings, convolutions or outputs."""
    stacks = [stack for stack in model.modules() if isinstance(stack, nn.ModuleList)]
    stacked = {id(p) for stack in stacks for p in stack.parameters()}
    return [(name, p) for name, p in decay_groups(model)[0] if p.ndim == 2 and id(p) in stacked]


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW over the trainable parameters in two groups; with `muon`, Muon before it for the matrices of the layers.

    Raises:
        ValueError: `muon` for a model without such matrices.
    """
    decay, keep = ([p for _, p in group if p.requires_grad] for group in decay_groups(model))
    optimizers: list[torch.optim.Optimizer] = []
    if config.muon is not None:
        matrices = [p for _, p in hidden_matrices(model) if p.requires_grad]
        if not matrices:
            raise ValueError(
                f"{type(model).__name__} has no stack of layers for Muon; leave optimizer.muon out"
            )
        optimizers.append(torch.optim.Muon(matrices, weight_decay=config.weight_decay))
        chosen = {id(p) for p in matrices}
        decay = [p for p in decay if id(p) not in chosen]
    settings: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.moments == "8bit" and decay:
        optimizers.append(adamw_8bit(decay, weight_decay=config.weight_decay, **settings))
        decay = []
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    if groups := [group for group in groups if group["params"]]:
        optimizers.append(torch.optim.AdamW(groups, fused=True, **settings))
        if config.variance_clip is not None:
            bound_variance(optimizers[-1], config.variance_clip)
    if config.moments == "paper":
        store_moments(optimizers, [p for _, p in hidden_matrices(model)])
    set_rate(optimizers, config, 0)
    return optimizers


def set_rate(
    optimizers: list[torch.optim.Optimizer], config: OptimizerConfig, step: int, share: float = 1.0
) -> None:
    """Gives every group the learning rate of an update, counted from 0, times a share (1/2 after one halving)."""
    for optimizer in optimizers:
        factor = config.muon if isinstance(optimizer, torch.optim.Muon) else 1.0
        for group in optimizer.param_groups:
            rate = share * factor * config.rate(step)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # compiled updates read it
            else:
                group["lr"] = rate


def bound_variance(optimizer: torch.optim.AdamW, limit: float) -> None:
    """From now on the running variance v is at most `limit` where parameters and moments are updated by it (B.2).

    The fused update leaves no room between v <- b v + (1 - b) g^2 and its use. So v is lowered before it, to at
    most (limit - (1 - b) g^2) / b, which makes the result min(limit, v). One gradient alone can exceed the limit
    if (1 - b) g^2 > limit, which the paper's clipping of the norm rules out; then v starts again from it.
    """

    @torch.no_grad()
    def lower(optimizer: torch.optim.AdamW, *_: Any) -> None:
        for group in optimizer.param_groups:
            b = group["betas"][1]
            used = [p for p in group["params"] if p.grad is not None and "exp_avg_sq" in optimizer.state[p]]
            for part in _parts(used, AT_ONCE):
                gradients = [_local(p.grad) for p in part]
                most = torch._foreach_mul(gradients, gradients)
                torch._foreach_mul_(most, -(1 - b) / b)
                torch._foreach_add_(most, limit / b)
                torch._foreach_clamp_min_(most, 0.0)
                torch._foreach_minimum_([_local(optimizer.state[p]["exp_avg_sq"]) for p in part], most)

    optimizer.register_step_pre_hook(lower)


def _parts(parameters: list[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """In order, in lists of so many elements or of one parameter."""
    part: list[Tensor] = []
    for parameter in parameters:
        if part and sum(p.numel() for p in part) + parameter.numel() > elements:
            yield part
            part = []
        part.append(parameter)
    if part:
        yield part


def _local(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor, else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

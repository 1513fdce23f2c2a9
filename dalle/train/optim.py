"""AdamW with the paper's groups: weight decay on matrices only (appendices A.2, B.2).

Short runs may leave the matrices of the layers to Muon (Jordan et al. 2024), which makes the singular values
of an update equal; at the size of the quick start it needs fewer steps than AdamW (LOG.md).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dalle.train.formats import keep_moments
from dalle.train.schedules import Schedule


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and Muon if asked; the defaults are the transformer's (B.2)."""

    lr: Schedule = Schedule(4.5e-4, 4.5e-4)
    """Step size."""
    warmup: int = 5000
    """Updates over which the step size rises linearly from 0 (B.2)."""
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
    moments: Literal["fp32", "paper"] = "fp32"
    """How Adam's moments of the layers' matrices are stored: paper rounds them to 1-6-9 and 0-6-10, emulated (B.2)."""
    muon: float | None = None
    """Step size of Muon over AdamW's, for the matrices of the layers; None gives them to AdamW (B.2)."""

    def __post_init__(self):
        if min(self.lr.start, self.lr.end) < 0 or self.warmup < 0:
            raise ValueError(f"step sizes and warmup cannot be negative, got {self.lr} and warmup {self.warmup}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or null not to clip, got {self.clip}")
        if self.muon is not None and not self.muon > 0:
            raise ValueError(f"muon must be positive, or null for AdamW alone, got {self.muon}")

    def rate(self, step: int) -> float:
        """Step size of an update, counted from 0."""
        return self.lr(step) * (min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0)


def decay_groups(model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(name, parameter) of matrices and convolutions, and of gains, biases and embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        embedding = id(parameter) in embeddings or name.endswith("embedding")  # open_clip's are bare parameters
        matrix = parameter.ndim >= 2 and not embedding
        (decay if matrix else keep).append((name, parameter))
    return decay, keep


def layer_matrices(model: nn.Module) -> list[tuple[str, Tensor]]:
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
        matrices = [p for _, p in layer_matrices(model) if p.requires_grad]
        if not matrices:
            raise ValueError(f"{type(model).__name__} has no stack of layers for Muon; leave optimizer.muon out")
        optimizers.append(torch.optim.Muon(matrices, weight_decay=config.weight_decay))
        chosen = {id(p) for p in matrices}
        decay = [p for p in decay if id(p) not in chosen]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    optimizers.append(torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=config.eps, fused=True))
    if config.moments == "paper":
        keep_moments(optimizers, [p for _, p in layer_matrices(model)])
    set_rate(optimizers, config, 0)
    return optimizers


def set_rate(optimizers: list[torch.optim.Optimizer], config: OptimizerConfig, step: int) -> None:
    """Gives every group the step size of an update, counted from 0."""
    for optimizer in optimizers:
        factor = config.muon if isinstance(optimizer, torch.optim.Muon) else 1.0
        for group in optimizer.param_groups:
            group["lr"] = factor * config.rate(step)

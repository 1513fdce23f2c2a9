"""AdamW with the paper's groups: weight decay on matrices only (appendices A.2, B.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle.train.schedules import Schedule


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the defaults are the transformer's (B.2)."""

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


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters in two groups."""
    decay, keep = ([p for _, p in group if p.requires_grad] for group in decay_groups(model))
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.rate(0), betas=betas, eps=config.eps, fused=True
    )

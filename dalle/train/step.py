"""One update, a function of state, batch, seed and step: loss, gradient, clip, optimizers, averaging."""

from typing import Any

import torch
from torch import Tensor, nn

from dalle.train.log import first_nonfinite
from dalle.train.optim import OptimizerConfig, set_rate
from dalle.train.precision import autocast
from dalle.train.scaling import GradientScales
from dalle.train.state import TrainState
from dalle.types import Loss, Objective


def train_step(
    state: TrainState, batch: Any, objective: Objective, optim: OptimizerConfig, precision: str, seed: int
) -> tuple[Loss, Tensor]:
    """One update: loss, gradient, clip, optimizers, averaging. Returns the loss and the gradient's norm.

    With gradient scales an update whose gradient is not finite is skipped, and counts as a step.
    """
    device = next(state.model.parameters()).device

    def forward() -> Loss:
        torch.manual_seed(step_seed(seed, state.step))
        with autocast(precision, device):
            return objective(state.model, batch, state.step)

    loss = forward()
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.total.backward()
    finite = state.scales.unscale() if state.scales else None
    if powersgd := state.extras.get("powersgd"):
        powersgd.reduce(state.step)
        finite = finite if finite is None else powersgd.share(finite)
    limit = float("inf") if optim.clip is None else optim.clip
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), limit)
    good = bool(torch.isfinite(norm))
    if not torch.isfinite(loss.total) or not (good or state.scales):
        where = first_nonfinite(state.model, forward)
        raise FloatingPointError(
            f"step {state.step + 1}: loss {float(loss.total.detach())}, gradient norm {float(norm)}; "
            f"first bad tensor: {where}. The last checkpoint is whole; lower the step size, or check the data"
        )
    if good:
        set_rate(state.optimizers, optim, state.step)
        for optimizer in state.optimizers:
            optimizer.step()
    if powersgd:
        loss.metrics |= powersgd.traffic()
    if state.scales:
        state.scales.update(finite)
        loss.metrics["skipped"] = float(not good)
    state.step += 1
    state.ema.update(state.model, state.step)
    return loss, norm


def gradient_scales(model: nn.Module) -> GradientScales:
    """A scale for each of the model's resblocks; ValueError for a model that cannot be scaled so."""
    if not hasattr(model, "resblocks"):
        raise ValueError(f"{type(model).__name__} has no gradient scales for fp16; set train.precision to bf16 or fp32")
    return GradientScales(model.resblocks())


def step_seed(seed: int, step: int) -> int:
    """A seed of its own for every step of every run."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of a batch (also in tuples, lists and dicts) on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch

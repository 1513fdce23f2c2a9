"""One update, a function of state, batch, seed and step: loss, gradient, clip, optimizers, averaging."""

from typing import Any

import torch
from torch import Tensor, nn

from dalle.train.nonfinite import Nonfinite, all_processes, first_nonfinite
from dalle.train.optim import OptimizerConfig, set_rate
from dalle.train.precision import autocast
from dalle.train.scaling import GradientScales
from dalle.train.state import TrainState
from dalle.types import Loss, Objective


def train_step(
    state: TrainState, batch: Any, objective: Objective, optim: OptimizerConfig, precision: str, seed: int
) -> tuple[Loss, Tensor]:
    """One update: loss, gradient, clip, optimizers, averaging. Returns the loss and the gradient's norm.

    An update whose loss or gradient is not finite is skipped, and counts as a step (dalle/train/nonfinite.py).

    Raises:
        FloatingPointError: too many in a row; names the first bad tensor.
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
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients: over all shards
    good = all_processes(torch.isfinite(norm) & torch.isfinite(loss.total.detach()))
    nonfinite = state.extras.setdefault("nonfinite", Nonfinite(limit=1))
    if good:
        nonfinite.made()
        if optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, optim.clip, norm)
        plateau = state.extras.get("plateau")
        set_rate(state.optimizers, optim, state.step, plateau.factor if plateau else 1.0)
        for optimizer in state.optimizers:
            optimizer.step()
        if plateau:
            plateau.see(loss.total)
    elif nonfinite.skip(scaled=state.scales is not None and all_processes(torch.isfinite(loss.total))):
        where = first_nonfinite(state.model, forward)
        raise FloatingPointError(
            f"step {state.step + 1}: loss {float(loss.total.detach())}, gradient norm {float(norm)}; "
            f"first bad tensor: {where}. Not finite for {nonfinite.in_a_row} in a row, which train.max_nonfinite ends. "
            "The last checkpoint is whole; lower the step size, or check the data"
        )
    if state.scales:
        state.scales.update(finite)
    state.step += 1
    if good:
        state.ema.update(state.model, state.step)
    loss.metrics["skipped"] = nonfinite.skipped
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

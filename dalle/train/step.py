"""Training step: loss, gradients, clipping, optimizers and EMA, as a function of state, batch, seed and
step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from dalle.train.config import OptimizerConfig
from dalle.train.distributed import Distributed
from dalle.train.dtensor import clip_gradients, gradient_norm
from dalle.train.grad_scaler import PerBlockGradScaler
from dalle.train.nonfinite import NonfiniteGuard, find_nonfinite
from dalle.train.optimizer import set_lr
from dalle.train.precision import autocast
from dalle.train.state import TrainState
from dalle.types import BatchShard, Loss, Objective


def train_step(
    state: TrainState,
    batch: Any,
    objective: Objective,
    config: OptimizerConfig,
    precision: str,
    seed: int,
    dist: Distributed | None = None,
    passes: int = 1,
) -> tuple[Loss, Tensor]:
    """One update of the state; returns the loss and the gradient norm.

    A step whose loss or gradient is not finite is skipped, and counts as a step (dalle/train/nonfinite.py).

    Args:
        batch: this process's shard.
        dist: the processes; default: a single one.
        passes: gradient accumulation: forward and backward passes of the shard; they change memory and no
            result.

    Raises:
        FloatingPointError: too many skipped steps in a row; names the first bad tensor.
    """
    dist = dist or Distributed()
    model, parts = state.model, split(batch, passes)
    device = next(model.parameters()).device
    shards = batch_shards(model, objective, parts, dist)

    def forward(i: int) -> Loss:
        torch.manual_seed(step_seed(seed, state.step))
        with autocast(precision, device):
            return Loss(*dist.forward(model, _loss_and_metrics, objective, parts[i], state.step, *shards[i]))

    loss, finite_blocks = accumulate_gradients(state, forward, passes, dist)
    norm = gradient_norm(model.parameters())
    finite = bool(dist.all_true(norm.isfinite() & loss.total.detach().isfinite()))
    guard = state.extras.setdefault("nonfinite", NonfiniteGuard(limit=1))
    if finite:
        guard.reset()
        optimize(state, norm, loss, config)
    elif guard.record_skip(scaled=state.scales is not None and bool(loss.total.isfinite())):
        where = find_nonfinite(model, lambda: [forward(i) for i in range(passes)], dist.all_true)
        raise FloatingPointError(
            f"step {state.step + 1}: loss {float(loss.total.detach())}, gradient norm {float(norm)}; "
            f"first bad tensor: {where}. {guard.in_a_row} steps in a row are not finite "
            "(train.max_skipped_steps). The last checkpoint is intact; lower the learning rate, "
            "or check the data"
        )
    if state.scales:
        state.scales.update(finite_blocks)
    state.step += 1
    if finite:
        state.ema.update(model, state.step)
    loss.metrics["skipped_steps"] = guard.skipped
    return loss, norm


def accumulate_gradients(
    state: TrainState, forward: Callable[[int], Loss], passes: int, dist: Distributed
) -> tuple[Loss, Tensor | None]:
    """Computes the gradients of a step, averaged over passes and processes.

    Returns:
        the loss of the whole batch; with gradient scales, bool (resblocks,): which have finite gradients.
    """
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    losses = []
    for i in range(passes):
        with dist.no_sync(i < passes - 1):
            losses.append(forward(i))
            losses[i].total.backward()
    dist.finish_gradients(state.model, passes)
    loss = mean_loss(losses, dist)
    finite_blocks = dist.all_true(state.scales.unscale()) if state.scales else None
    if powersgd := state.extras.get("powersgd"):
        powersgd.reduce(state.step)
        loss.metrics |= powersgd.traffic()
    return loss, finite_blocks


def _loss_and_metrics(model: nn.Module, objective: Objective, *args: Any) -> tuple[Tensor, dict[str, Any]]:
    """The loss as DDP and FSDP need it: tensors in tuples and dicts."""
    loss = objective(model, *args)
    return loss.total, loss.metrics


def batch_shards(
    model: nn.Module, objective: Objective, parts: list[Any], dist: Distributed
) -> list[tuple[BatchShard, ...]]:
    """The `BatchShard` argument of the objective for each pass; none where one pass sees the whole batch."""
    if len(parts) * dist.world_size == 1:
        return [()]
    count = getattr(objective, "num_targets", None)
    num_targets = dist.all_reduce(sum(count(model, part) for part in parts)) if count else None
    return [(dist.shard_of(i, len(parts), num_targets),) for i in range(len(parts))]


def optimize(state: TrainState, norm: Tensor, loss: Loss, config: OptimizerConfig) -> None:
    """Clips the gradients, whose norm is given, and steps the optimizers and the plateau rule."""
    if config.max_grad_norm is not None:
        clip_gradients(state.model.parameters(), norm, config.max_grad_norm)
    plateau = state.extras.get("plateau")
    set_lr(state.optimizers, config, state.step, plateau.factor if plateau else 1.0)
    for optimizer in state.optimizers:
        optimizer.step()
    if plateau:
        plateau.step(float(loss.total.detach()))


def mean_loss(losses: list[Loss], dist: Distributed) -> Loss:
    """Total and metrics of a step: the mean over its passes and over the processes, detached."""
    if len(losses) * dist.world_size == 1:
        return losses[0]
    names, device = list(losses[0].metrics), losses[0].total.device
    rows = [[loss.total.detach(), *(loss.metrics[name] for name in names)] for loss in losses]
    table = torch.stack(
        [torch.stack([torch.as_tensor(v, device=device).float() for v in row]) for row in rows]
    )
    total, *values = (dist.all_reduce(table.mean(dim=0)) / dist.world_size).unbind()
    return Loss(total, dict(zip(names, values, strict=True)))


def split(batch: Any, count: int) -> list[Any]:
    """A batch (tensors in tuples, lists and dicts) in `count` equal parts; ValueError if not divisible."""
    if count == 1:
        return [batch]
    tensors, structure = tree_flatten(batch)
    for tensor in tensors:
        if len(tensor) % count:
            raise ValueError(
                f"{len(tensor)} samples do not divide among {count} passes; "
                "change batch_size or grad_accum_steps"
            )
    parts = zip(*(tensor.chunk(count) for tensor in tensors), strict=True)
    return [tree_unflatten(part, structure) for part in parts]


def build_grad_scaler(model: nn.Module) -> PerBlockGradScaler:
    """A gradient scale for each resblock; ValueError for a model without resblocks.

    The paper divides the loss by the images of all M processes and multiplies the scales by M. Here each
    process
    takes the mean over its shard, M times as large, and gradients are averaged in fp32: the same numbers in
    fp16.
    """
    if not hasattr(model, "resblocks"):
        raise ValueError(
            f"{type(model).__name__} has no gradient scales for fp16; set train.precision to bf16 or fp32"
        )
    return PerBlockGradScaler(model.resblocks())


def step_seed(seed: int, step: int) -> int:
    """A distinct seed for every step of every run."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch (also in tuples, lists and dicts) on the device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)

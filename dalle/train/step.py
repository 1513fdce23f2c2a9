"""Training step: loss, gradients, clipping, optimizers and EMA, as a function of state, batch, seed and step.

A step whose loss or gradient is not finite is skipped and counted: it changes no weights, moments or
averages, and the next step has the next batch. With gradient scales (fp16) this is part of the method: the
paper skipped one step in twenty. Too many in a row end the run. All this happens on the device: the host
waits for a GPU only in a step in which it is to look.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from dalle.train.config import OptimizerConfig
from dalle.train.distributed import Distributed, is_dtensor, local
from dalle.train.nonfinite import NonfiniteGuard, find_nonfinite
from dalle.train.optimizer import set_lr, step_unless
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
    look: bool = True,
) -> tuple[Loss, Tensor]:
    """One update of the state; returns the loss and the gradient norm.

    Args:
        batch: this process's shard.
        passes: forward and backward passes of the shard (gradient accumulation); the result is the same.
        look: raises what is to be raised, for which a GPU is waited for. Without it a later step does.

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
    finite = dist.all_true(norm.isfinite() & loss.total.detach().isfinite())
    guard = state.extras.setdefault("nonfinite", NonfiniteGuard(1, device))
    made = guard.admit(finite, loss.total, state.scales.patience if state.scales else 1)
    if guard.at_end(look):
        where = find_nonfinite(model, lambda: [forward(i) for i in range(passes)], dist)
        raise FloatingPointError(
            f"step {state.step + 1}: loss {float(loss.total.detach())}, gradient norm {float(norm)}; "
            f"first bad tensor: {where}. {int(guard.in_a_row)} steps in a row are not finite "
            "(train.max_skipped_steps). The last checkpoint is intact; lower the learning rate, "
            "or check the data"
        )
    optimize(state, norm, loss, made, config)
    if state.scales:
        state.scales.update(finite_blocks)
    state.step += 1
    state.ema.update(model, state.step, made)
    loss.metrics["skipped_steps"] = guard.skipped
    return loss, norm


def accumulate_gradients(
    state: TrainState, forward: Callable[[int], Loss], passes: int, dist: Distributed
) -> tuple[Loss, Tensor | None]:
    """Computes the gradients of a step, averaged over passes and processes.

    Returns the loss of the whole batch and, with gradient scales, bool (resblocks,): whose are finite.
    """
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    losses = []
    for i in range(passes):
        with dist.no_sync(i < passes - 1):
            losses.append(forward(i))
            total = losses[i].total
            (state.scales.scale(total) if state.scales else total).backward()
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
    passes, count = len(parts), len(parts) * dist.world_size
    if count == 1:
        return [()]
    count_targets = getattr(objective, "num_targets", None)
    targets = dist.all_reduce(sum(count_targets(model, part) for part in parts)) if count_targets else None
    indices = range(dist.rank * passes, (dist.rank + 1) * passes)
    return [(BatchShard(index, count, targets, dist.all_reduce, dist.gather),) for index in indices]


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm over all gradients and all their shards: a plain scalar, the same in every process."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    by_kind = [[g for g in gradients if is_dtensor(g) == sharded] for sharded in (False, True)]
    norms = [get_total_norm(each) for each in by_kind if each]
    full = torch.stack([norm.full_tensor() if is_dtensor(norm) else norm for norm in norms])
    return full[0] if len(full) == 1 else torch.linalg.vector_norm(full)


def optimize(state: TrainState, norm: Tensor, loss: Loss, made: Tensor, config: OptimizerConfig) -> None:
    """Clips the gradients, whose norm is given, and steps the optimizers and the plateau rule.

    Where `made` (bool ()) is False nothing changes, on the device.
    """
    if config.max_grad_norm is not None:
        scale = (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        scale = scale.masked_fill(~made, 1.0)
        torch._foreach_mul_([local(p.grad) for p in state.model.parameters() if p.grad is not None], scale)
    plateau = state.extras.get("plateau")
    set_lr(state.optimizers, config, state.step, plateau.factor if plateau else 1.0)
    for optimizer in state.optimizers:
        step_unless(optimizer, ~made)
    if plateau:
        plateau.step(loss.total.detach().masked_fill(~made, torch.nan))


def mean_loss(losses: list[Loss], dist: Distributed) -> Loss:
    """Total and metrics of a step: the mean over its passes and over the processes, detached."""
    if len(losses) * dist.world_size == 1:
        return losses[0]
    names, device = list(losses[0].metrics), losses[0].total.device
    rows = [[loss.total.detach(), *(loss.metrics[name] for name in names)] for loss in losses]
    table = torch.stack([torch.stack([_on_device(value, device) for value in row]) for row in rows])
    total, *values = (dist.all_reduce(table.mean(dim=0)) / dist.world_size).unbind()
    return Loss(total, dict(zip(names, values, strict=True)))


def _on_device(value: Tensor | float, device: torch.device) -> Tensor:
    """fp32 (); a number is filled in by a kernel, since a copy would wait for the device."""
    return value.float() if isinstance(value, Tensor) else torch.full((), value, device=device)


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


def step_seed(seed: int, step: int) -> int:
    """A distinct seed for every step of every run."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch (also in tuples, lists and dicts) on the device.

    MPS reads the memory of a copy that is not waited for when it may be another's (pytorch issue 189690).
    """
    no_wait = device.type == "cuda"
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=no_wait), batch)

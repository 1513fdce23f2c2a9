"""One update, a function of state, batch, seed and step: loss, gradient, clip, optimizers, averaging."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dalle.train.distributed import Parallel
from dalle.train.dtensor import clip_gradients, gradient_norm
from dalle.train.grad_scaler import PerBlockGradScaler
from dalle.train.nonfinite import NonfiniteGuard, first_nonfinite
from dalle.train.optimizer import OptimizerConfig, set_rate
from dalle.train.precision import autocast
from dalle.train.state import TrainState
from dalle.types import Loss, Objective


def train_step(
    state: TrainState,
    batch: Any,
    objective: Objective,
    optim: OptimizerConfig,
    precision: str,
    seed: int,
    parallel: Parallel | None = None,
    passes: int = 1,
) -> tuple[Loss, Tensor]:
    """One update: loss, gradient, clip, optimizers, averaging. Returns the loss and the gradient's norm.

    An update whose loss or gradient is not finite is skipped, and counts as a step (dalle/train/nonfinite.py).

    Args:
        batch: this process's part.
        parallel: the processes; one alone unless given.
        passes: forward and backward passes that the part is divided among; they change memory and no result.

    Raises:
        FloatingPointError: too many in a row; names the first bad tensor.
    """
    parallel = parallel or Parallel()
    forwards = forward_passes(state, batch, objective, precision, seed, parallel, passes)
    loss, finite = gradients(state, forwards, parallel)
    norm = gradient_norm(state.model.parameters())
    good = bool(parallel.all_true(torch.isfinite(norm) & torch.isfinite(loss.total.detach())))
    nonfinite = state.extras.setdefault("nonfinite", NonfiniteGuard(limit=1))
    if good:
        nonfinite.made()
        optimize(state, norm, loss, optim)
    elif nonfinite.skip(scaled=state.scales is not None and bool(torch.isfinite(loss.total))):
        where = first_nonfinite(state.model, lambda: [forward() for forward in forwards], parallel.all_true)
        raise FloatingPointError(
            f"step {state.step + 1}: loss {float(loss.total.detach())}, gradient norm {float(norm)}; "
            f"first bad tensor: {where}. Not finite for {nonfinite.in_a_row} in a row, which train.max_nonfinite ends. "
            "The last checkpoint is whole; lower the learning rate, or check the data"
        )
    if state.scales:
        state.scales.update(finite)
    state.step += 1
    if good:
        state.ema.update(state.model, state.step)
    loss.metrics["skipped"] = nonfinite.skipped
    return loss, norm


def gradients(
    state: TrainState, forwards: list[Callable[[], Loss]], parallel: Parallel
) -> tuple[Loss, Tensor | None]:
    """Runs the passes of a step and leaves its gradients, those of all processes averaged, in the parameters.

    Returns:
        the loss of the whole batch; bool (resblocks,), which have finite gradients, with gradient scales only.
    """
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    losses = []
    for number, forward in enumerate(forwards, start=1):
        with parallel.collecting(last=number == len(forwards)):
            losses.append(forward())
            losses[-1].total.backward()
    parallel.finish_gradients(state.model, len(forwards))
    loss = mean_loss(losses, parallel)
    finite = parallel.all_true(state.scales.unscale()) if state.scales else None
    if powersgd := state.extras.get("powersgd"):
        powersgd.reduce(state.step)
        loss.metrics |= powersgd.traffic()
    return loss, finite


def optimize(state: TrainState, norm: Tensor, loss: Loss, optim: OptimizerConfig) -> None:
    """Clips the gradients, of that norm, and makes the update."""
    if optim.clip is not None:
        clip_gradients(state.model.parameters(), norm, optim.clip)
    plateau = state.extras.get("plateau")
    set_rate(state.optimizers, optim, state.step, plateau.factor if plateau else 1.0)
    for optimizer in state.optimizers:
        optimizer.step()
    if plateau:
        plateau.see(float(loss.total.detach()))


def forward_passes(
    state: TrainState,
    batch: Any,
    objective: Objective,
    precision: str,
    seed: int,
    parallel: Parallel,
    passes: int,
) -> list[Callable[[], Loss]]:
    """The forward passes of a step in this process; each may be run again and gives the same.

    Every process and every pass has the same seed; an objective that draws tells its part by `Part.index`.
    """
    step, device = state.step, next(state.model.parameters()).device
    pieces = split(batch, passes)
    count = getattr(objective, "counts", None)
    several = passes * parallel.world > 1
    counts = (
        parallel.all_sum(sum(count(state.model, piece) for piece in pieces)) if several and count else None
    )

    def run(model: nn.Module, number: int) -> tuple[Tensor, dict[str, Any]]:
        part = (parallel.part(number, passes, counts),) if several else ()
        loss = objective(model, pieces[number], step, *part)
        return loss.total, loss.metrics

    def forward(number: int) -> Loss:
        torch.manual_seed(step_seed(seed, step))
        with autocast(precision, device):
            return Loss(*parallel.run(state.model, run, number))

    return [partial(forward, number) for number in range(passes)]


def mean_loss(losses: list[Loss], parallel: Parallel) -> Loss:
    """Total and metrics of a step: the mean over its passes and over the processes, detached."""
    if len(losses) * parallel.world == 1:
        return losses[0]
    names = list(losses[0].metrics)
    device = losses[0].total.device
    rows = [[loss.total.detach(), *(loss.metrics[name] for name in names)] for loss in losses]
    table = torch.stack(
        [torch.stack([torch.as_tensor(v, device=device).float() for v in row]) for row in rows]
    )
    total, *values = parallel.all_mean(table.mean(dim=0)).unbind()
    return Loss(total, dict(zip(names, values, strict=True)))


def split(batch: Any, count: int) -> list[Any]:
    """A batch as `count` equal parts in order; ValueError where it does not divide."""
    if count == 1:
        return [batch]
    if isinstance(batch, dict):
        return [dict(zip(batch, parts, strict=True)) for parts in split(tuple(batch.values()), count)]
    if isinstance(batch, tuple | list):
        return [type(batch)(parts) for parts in zip(*(split(value, count) for value in batch), strict=True)]
    if len(batch) % count:
        raise ValueError(
            f"{len(batch)} samples do not divide among {count} passes; change batch_size or accumulate"
        )
    return list(batch.chunk(count))


def build_grad_scaler(model: nn.Module) -> PerBlockGradScaler:
    """A scale for each of the model's resblocks; ValueError for a model that cannot be scaled so.

    The paper divides the loss by the images of all M processes and multiplies the scales by M. Here each process
    takes the mean of its own part, M times as large, and the fp32 means of the gradients divide by M: the same numbers
    stand in fp16, and a scale means the same on any number of processes.
    """
    if not hasattr(model, "resblocks"):
        raise ValueError(
            f"{type(model).__name__} has no gradient scales for fp16; set train.precision to bf16 or fp32"
        )
    return PerBlockGradScaler(model.resblocks())


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

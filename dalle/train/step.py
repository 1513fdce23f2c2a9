"""Training step: loss, gradients, clipping, optimizers and EMA, as a function of state, batch, seed and step.

A step whose loss or gradient is not finite is skipped and counted: it changes no weights, moments or
averages, and the next step has the next batch. With gradient scales (fp16) this is part of the method: the
paper skipped one step in twenty. Too many in a row end the run.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from dalle.train.config import OptimizerConfig
from dalle.train.distributed import Distributed, is_dtensor, local
from dalle.train.grad_scaler import BACKOFF_INTERVAL
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

    Args:
        batch: this process's shard.
        passes: forward and backward passes of the shard (gradient accumulation); the result is the same.

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
        guard.in_a_row = 0
        optimize(state, norm, loss, config)
    elif guard.record_skip(scaled=state.scales is not None and bool(loss.total.isfinite())):
        where = find_nonfinite(model, lambda: [forward(i) for i in range(passes)], dist)
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

    Returns the loss of the whole batch and, with gradient scales, bool (resblocks,): whose are finite.
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


def optimize(state: TrainState, norm: Tensor, loss: Loss, config: OptimizerConfig) -> None:
    """Clips the gradients, whose norm is given, and steps the optimizers and the plateau rule."""
    if config.max_grad_norm is not None:
        scale = (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_([local(p.grad) for p in state.model.parameters() if p.grad is not None], scale)
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


def step_seed(seed: int, step: int) -> int:
    """A distinct seed for every step of every run."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch (also in tuples, lists and dicts) on the device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


@dataclass
class NonfiniteGuard:
    """Counts skipped steps, in all and in a row; `limit` in a row end the run."""

    limit: int
    skipped: int = 0
    in_a_row: int = 0

    def record_skip(self, scaled: bool) -> bool:
        """Counts a skipped step; whether these are too many in a row.

        Gradient scales (`scaled`) are lowered once in 125 steps, so with them the limit is 125 times as high.
        """
        self.skipped += 1
        self.in_a_row += 1
        return self.in_a_row >= self.limit * (BACKOFF_INTERVAL if scaled else 1)

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def find_nonfinite(model: nn.Module, forward: Callable[[], Any], dist: Distributed) -> str:
    """The first tensor that is not finite in any process: a parameter, a module's output or a gradient.

    `forward` repeats the failing forward pass.
    """
    parameters = dict(model.named_parameters())
    yes = torch.ones((), dtype=torch.bool, device=local(next(iter(parameters.values()))).device)

    def finite(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([yes, *(torch.isfinite(local(tensor)).all() for tensor in tensors)]).all()

    def first_bad(flags: dict[str, Tensor]) -> str | None:
        together = dist.all_true(torch.stack([*flags.values()])).tolist() if flags else []
        return next((name for name, good in zip(flags, together, strict=True) if not good), None)

    if bad := first_bad({f"parameter {name}": finite([p]) for name, p in parameters.items()}):
        return bad
    names, outputs = {module: name or "the model" for name, module in model.named_modules()}, {}

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if name := names.get(module):
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            outputs[f"output of {name}"] = outputs.get(f"output of {name}", yes) & finite(tensors)

    with register_module_forward_hook(watch), torch.no_grad():
        forward()
    gradients = {
        f"gradient of {n}": finite([] if p.grad is None else [p.grad]) for n, p in parameters.items()
    }
    return first_bad(outputs) or first_bad(gradients) or "the loss itself"

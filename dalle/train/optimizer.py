"""Optimizers: AdamW with the paper's parameter groups and clipped variance (A.2, B.2), optionally Muon.

Muon (Jordan et al. 2024) for the matrices of the layers needs fewer steps than AdamW at the size of the quick
start (docs/log.md).
"""

import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dalle.train.config import VARIANCE_CHUNK, OptimizerConfig, PlateauConfig
from dalle.train.distributed import distribute_like, is_dtensor, local
from dalle.train.float_formats import store_moments

INNER = ("codes", "scale")
"""Tensors inside torchao's 8-bit tensors."""


def decay_groups(model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(name, parameter) of matrices and convolutions, and of gains, biases and embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        embedding = id(parameter) in embeddings or name.endswith("embedding")  # open_clip's are bare
        (keep if parameter.ndim < 2 or embedding else decay).append((name, parameter))
    return decay, keep


def hidden_matrices(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter) of the matrices in stacks of layers: not embeddings, convolutions or outputs."""
    stacks = [stack for stack in model.modules() if isinstance(stack, nn.ModuleList)]
    stacked = {id(p) for stack in stacks for p in stack.parameters()}
    return [(name, p) for name, p in decay_groups(model)[0] if p.ndim == 2 and id(p) in stacked]


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW over the trainable parameters in two groups; Muon before it for the matrices of the layers."""
    decay, keep = ([p for _, p in group if p.requires_grad] for group in decay_groups(model))
    optimizers: list[torch.optim.Optimizer] = []
    if config.muon_lr_scale is not None:
        matrices = [p for _, p in hidden_matrices(model) if p.requires_grad]
        if not matrices:
            raise ValueError(f"{type(model).__name__} has no stack of layers for Muon; omit muon_lr_scale")
        optimizers.append(torch.optim.Muon(matrices, weight_decay=config.weight_decay))
        chosen = {id(p) for p in matrices}
        decay = [p for p in decay if id(p) not in chosen]
    settings: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.state_dtype == "8bit" and decay:
        optimizers.append(adamw_8bit(decay, weight_decay=config.weight_decay, **settings))
        decay = []
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    if groups := [group for group in groups if group["params"]]:
        optimizers.append(torch.optim.AdamW(groups, fused=True, **settings))
        if config.max_variance is not None:
            clip_second_moment(optimizers[-1], config.max_variance)
    if config.state_dtype == "paper":
        store_moments(optimizers, [p for _, p in hidden_matrices(model)])
    set_lr(optimizers, config, 0)
    return optimizers


def set_lr(
    optimizers: list[torch.optim.Optimizer], config: OptimizerConfig, step: int, share: float = 1.0
) -> None:
    """Sets the learning rate of a step, counted from 0, times `share` (1/2 after one plateau)."""
    for optimizer in optimizers:
        factor = config.muon_lr_scale if isinstance(optimizer, torch.optim.Muon) else 1.0
        for group in optimizer.param_groups:
            rate = share * factor * config.lr_at(step)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # compiled updates read it
            else:
                group["lr"] = rate


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """optimizer.step(), which changes nothing where `skip` (bool (), on the device) is True.

    torch's fused AdamW reads it as torch.amp's `found_inf` on CPUs and CUDA. Others are undone afterwards: a
    copy of their parameters and moments exists during the step.
    """
    optimizer.skip = skip  # for `clip_second_moment`
    if optimizer.defaults.get("fused") and skip.device.type in ("cpu", "cuda"):
        optimizer.found_inf = skip.float()
        optimizer.step()
        return
    kept = {key: tensor.clone() for key, tensor in _changing(optimizer).items()}
    optimizer.step()
    for key, tensor in _changing(optimizer).items():
        before = kept.get(key, torch.zeros_like(tensor))  # a first moment
        tensor.copy_(torch.where(skip, before, tensor))


def _changing(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Plain tensors that a step changes, as shards: parameters and moments."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    found = {}
    for i, p in enumerate(parameters):
        for name, value in {"": p, **optimizer.state.get(p, {})}.items():
            for key, tensor in plain_tensors(name, value).items():
                found[i, key] = local(tensor).detach()
    return found


def clip_second_moment(optimizer: torch.optim.AdamW, limit: float) -> None:
    """Keeps the second moment v at most `limit` in all further steps (B.2).

    The fused step updates v <- b v + (1 - b) g^2 and uses it at once. So v is lowered before, to at most
    (limit - (1 - b) g^2) / b, which makes the result min(limit, v). Only if (1 - b) g^2 alone exceeds the
    limit, which clipping the gradient norm rules out, v exceeds it too.
    """

    @torch.no_grad()
    def lower(optimizer: torch.optim.AdamW, *_: Any) -> None:
        for group in optimizer.param_groups:
            b, skip = group["betas"][1], getattr(optimizer, "skip", None)
            used = [p for p in group["params"] if p.grad is not None and "exp_avg_sq" in optimizer.state[p]]
            while used:
                sizes = accumulate(local(p).numel() for p in used)
                count = max(1, sum(size <= VARIANCE_CHUNK for size in sizes))
                part, used = used[:count], used[count:]
                gradients = [local(p.grad) for p in part]
                most = torch._foreach_mul(gradients, gradients)
                torch._foreach_mul_(most, -(1 - b) / b)
                torch._foreach_add_(most, limit / b)
                torch._foreach_clamp_min_(most, 0.0)
                for each in most if skip is not None else ():
                    each.masked_fill_(skip, torch.inf)  # a skipped step lowers nothing
                torch._foreach_minimum_([local(optimizer.state[p]["exp_avg_sq"]) for p in part], most)

    optimizer.register_step_pre_hook(lower)


def adamw_8bit(parameters: list[Tensor], **settings: Any) -> torch.optim.Optimizer:
    """torchao's AdamW8bit; ImportError without torchao, ValueError for sharded parameters."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ImportError('8-bit moments need torchao: pip install "zeroshot-text2image[lowbit]"') from None
    if any(map(is_dtensor, parameters)):
        raise ValueError(
            "8-bit moments of sharded parameters cannot be saved for another number of processes; "
            "set optimizer.state_dtype to fp32, or --parallel to none or ddp"
        )
    optimizer = AdamW8bit(parameters, **settings)
    optimizer.register_step_pre_hook(init_8bit_moments)
    return optimizer


def init_8bit_moments(optimizer: Any, *_: Any) -> None:
    """Moments with the count of steps on the parameter's device: torchao's own, on the CPU, makes
    `step_unless` wait for a GPU."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for p in parameters:
        if not optimizer.state[p]:
            moments = {
                "exp_avg": optimizer._new_buffer(p, True),
                "exp_avg_sq": optimizer._new_buffer(p, False),
            }
            optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments


def plain_tensors(moment: str, value: Tensor) -> dict[str, Tensor]:
    """A moment as plain tensors by name: itself, or "exp_avg.codes" and "exp_avg.scale"."""
    if hasattr(value, "codes"):
        return {f"{moment}.{inner}": getattr(value, inner) for inner in INNER}
    return {moment: value}


def load_moment(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str, tensor: Tensor) -> None:
    """Loads a tensor of `plain_tensors`; an 8-bit optimizer quantizes fp32 moments, no other reads 8 bits."""
    moment, _, inner = name.partition(".")
    state, in_8bit = optimizer.state[parameter], hasattr(optimizer, "_new_buffer")
    if inner and not in_8bit:
        raise ValueError("the checkpoint has moments of 8 bits; set optimizer.state_dtype to 8bit")
    if moment not in state:
        if moment == "step":
            state[moment] = torch.empty_like(tensor, device=parameter.device)
        elif in_8bit:
            state[moment] = optimizer._new_buffer(parameter, signed=moment == "exp_avg")
        else:
            state[moment] = torch.empty_like(parameter, dtype=tensor.dtype)  # strides of fused kernels
    target = getattr(state[moment], inner) if inner else state[moment]
    target.copy_(distribute_like(tensor, target))


class ReduceLROnPlateau:
    """Halves the learning rate when the training loss plateaus (B.2); `factor` multiplies it.

    The paper does not define a plateau. Here the mean loss of `window` steps makes one reading, and
    `patience` readings in a row that are not below the best one by `threshold` make a plateau.
    """

    def __init__(self, config: PlateauConfig):
        self.config = config
        self.waiting: list[float | Tensor] = []  # losses on the device, not yet part of the reading
        self.total, self.count = 0.0, 0  # of the current reading
        self.best, self.bad_readings, self.reductions = math.inf, 0, 0

    @property
    def factor(self) -> float:
        return 0.5**self.reductions

    def step(self, loss: float | Tensor) -> None:
        """Adds the loss of an update, the same number in every process; NaN for a step that was not made.

        A tensor stays on its device until a reading may be complete.
        """
        if self.reductions == self.config.max_reductions:
            return
        self.waiting.append(loss)
        if self.count + len(self.waiting) >= self.config.window:
            self._read()

    def _read(self) -> None:
        losses = [loss for loss in map(float, self.waiting) if not math.isnan(loss)]
        self.waiting = []
        for loss in losses:
            self.total += loss
        self.count += len(losses)
        if self.count < self.config.window:
            return
        mean, self.total, self.count = self.total / self.count, 0.0, 0
        self.bad_readings += 1
        if mean < self.best - self.config.threshold:
            self.best, self.bad_readings = mean, 0
        if self.bad_readings == self.config.patience:
            self.reductions, self.bad_readings = self.reductions + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """All that changes; no best reading yet is None (JSON has no infinity)."""
        self._read()
        state = {key: value for key, value in vars(self).items() if key not in ("config", "waiting")}
        return state | {"best": None if math.isinf(self.best) else self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.waiting = []
        vars(self).update(state | {"best": math.inf if state["best"] is None else state["best"]})

"""Training state: model, optimizers, EMA, gradient scales and counters, as named tensors and numbers.

Random numbers, learning rate and data position are not part of it: they follow from seed and step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle.io.files import load_strict
from dalle.train.config import EMAConfig
from dalle.train.distributed import distribute_like, local
from dalle.train.grad_scaler import GradScaler
from dalle.train.optimizer import load_moment, plain_tensors


class EMA:
    """Sums of a model's trainable parameters by name, for averages corrected for their start (A.2, B.2).

    After n updates with decay d a plain average holds the fraction d^n of its initial value: 67 % after 1,000
    steps with an update every 25 and decay 0.99. So the sum starts at 0 and is divided by 1 - d^n.
    """

    def __init__(self, model: nn.Module, config: EMAConfig):
        self.config = config
        self.device = None if config.device == "same" else config.device
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.sums = {name: torch.zeros_like(p).to(device=self.device) for name, p in trained.items()}
        like = next(iter(model.parameters()))
        self.count = torch.zeros((), dtype=torch.int64, device=like.device)  # of updates, on the device

    @property
    def updates(self) -> int:
        """Number of updates; a GPU is waited for."""
        return int(self.count)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, made: Tensor | None = None) -> None:
        """After step `step` (counted from 1): adds the weights if it is their turn.

        A step that was not `made` (bool (), on the device) adds nothing.
        """
        if step % self.config.update_every:
            return
        made = torch.ones_like(self.count, dtype=torch.bool) if made is None else made
        self.count += made
        named = dict(model.named_parameters())
        for name, total in self.sums.items():
            held, weights = local(total), local(named[name].detach())
            weights = copy_on_cpu(weights) if self.device == "cpu" else weights
            weights = torch.where(made.to(held.device), weights, held)
            held.lerp_(weights, 1 - self.config.decay)

    def averaged(self) -> dict[str, Tensor]:
        """The corrected averages; empty before the first update."""
        return bias_corrected(self.sums, self.config.decay, self.updates)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the averages inside the block and its own weights after it.

        They are swapped one by one; the weights wait where the averages are stored.
        """
        own: dict[str, Tensor] = {}
        updates = self.updates
        weights = {name: local(p.detach()) for name, p in model.named_parameters() if name in self.sums}
        try:
            with torch.no_grad():
                for name, weight in weights.items() if updates else ():
                    own[name] = weight.clone() if self.device is None else copy_on_cpu(weight)
                    weight.copy_(self._average(name, updates, pin_memory=weight.is_cuda))
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    weights[name].copy_(value)

    def _average(self, name: str, updates: int, pin_memory: bool) -> Tensor:
        """This process's shard of one average, in pinned memory if it is on the CPU."""
        total = local(self.sums[name])
        average = torch.empty_like(total, pin_memory=pin_memory and total.is_cpu)
        return torch.div(total, 1 - self.config.decay**updates, out=average)


def copy_on_cpu(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, pinned if it is of a GPU, which copies several times as fast."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def bias_corrected(sums: dict[str, Tensor], decay: float, updates: int) -> dict[str, Tensor]:
    """Sums divided by 1 - decay^updates; empty without updates."""
    return {name: s / (1 - decay**updates) for name, s in sums.items()} if updates else {}


@dataclass
class TrainState:
    """All that changes during training."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    ema: EMA
    scales: GradScaler | None = None
    step: int = 0
    extras: dict[str, Any] = field(default_factory=dict)
    """Parts with state_dict and load_state_dict by name: nonfinite, plateau, powersgd. Their tensors that
    differ between processes are DTensors."""

    def state_dict(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by file and name, sharded as the parameters are, and numbers."""
        tensors = {"model": self.model.state_dict(), "ema": self.ema.sums, "optimizer": self._moments()}
        if self.scales:
            tensors["scales"] = self.scales.state_dict()
        numbers: dict[str, Any] = {}
        for name, part in self.extras.items():
            state = part.state_dict()
            part_tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            if part_tensors:
                tensors[name] = part_tensors
            numbers[name] = {key: value for key, value in state.items() if key not in part_tensors}
        config = self.ema.config
        ema = {"decay": config.decay, "update_every": config.update_every, "updates": self.ema.updates}
        return tensors, {"step": self.step, "ema": ema, "extras": numbers}

    def targets(
        self,
        tensors: dict[str, dict[str, Tensor]],
        file: str,
        stored: dict[str, tuple[torch.Size, torch.dtype]],
    ) -> dict[str, Tensor]:
        """Tensors to read a checkpoint's file into, of the shapes and dtypes `stored` in it.

        Weights and averages are the state's own `tensors`, the others new ones that are sharded as those are.
        """
        like = tensors.get(file, {})
        if file == "optimizer":  # a new optimizer has no moments: they are sharded as their parameters
            parameters = dict(self.model.named_parameters())
            like = {name: parameters[name.rsplit("/", 1)[0]] for name in stored}
        found = {}
        for name, (shape, dtype) in stored.items():
            if name not in like or like[name].shape != shape:
                found[name] = torch.empty(shape, dtype=dtype)
            elif file in ("model", "ema") and like[name].dtype == dtype:
                found[name] = like[name]
            else:
                found[name] = torch.empty_like(like[name], dtype=dtype, requires_grad=False)
        return found

    def load(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any], source: Path) -> None:
        """Loads what `state_dict` returned; ValueError if it does not fit the model."""
        own = self.model.state_dict()
        weights = {n: distribute_like(t, own[n]) if n in own else t for n, t in tensors["model"].items()}
        load_strict(self.model, weights, source)
        ema = numbers["ema"]
        self.ema.config = replace(self.ema.config, decay=ema["decay"], update_every=ema["update_every"])
        self.ema.count.fill_(ema["updates"])
        for name, tensor in tensors["ema"].items():
            self.ema.sums[name].copy_(distribute_like(tensor, self.ema.sums[name]))
        self._load_moments(tensors["optimizer"])
        if self.scales and "scales" in tensors:
            self.scales.load_state_dict(tensors["scales"])
        for name, part in self.extras.items():
            if name in numbers.get("extras", {}):  # else it is new to the run
                part.load_state_dict(numbers["extras"][name] | tensors.get(name, {}))
        self.step = numbers["step"]

    def _moments(self) -> dict[str, Tensor]:
        """The optimizers' moments, "parameter/moment"."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            f"{names[parameter]}/{name}": tensor
            for optimizer in self.optimizers
            for parameter, moments in optimizer.state.items()
            for moment, value in moments.items()
            for name, tensor in plain_tensors(moment, value).items()
        }

    def _load_moments(self, moments: dict[str, Tensor]) -> None:
        names = dict(self.model.named_parameters())
        owners = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for key in list(moments):
            name, moment = key.rsplit("/", 1)
            load_moment(owners[names[name]], names[name], moment, moments.pop(key))  # each is freed

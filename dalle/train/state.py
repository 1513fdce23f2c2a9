"""Training state: model, optimizers, EMA, gradient scales and counters, as named tensors and numbers.

Random numbers, learning rate and data position are not part of it: they follow from seed and step.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dalle.io.files import load_strict
from dalle.train.dtensor import distribute_like
from dalle.train.ema import EMA
from dalle.train.grad_scaler import PerBlockGradScaler
from dalle.train.optimizer import load_moment, plain_tensors


class Stateful(Protocol):
    """A stateful part of training: tensors and numbers by name.

    A tensor that differs between processes is a DTensor (`sharded_checkpoint.per_rank_tensor`); with another
    number of processes it is loaded as one tensor (processes of the checkpoint, ...).
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainState:
    """All that changes during training."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    ema: EMA
    scales: PerBlockGradScaler | None = None
    step: int = 0
    extras: dict[str, Stateful] = field(default_factory=dict)
    """Other stateful parts, by name: nonfinite, plateau, powersgd."""

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

    def empty_like(
        self,
        tensors: dict[str, dict[str, Tensor]],
        file: str,
        stored: dict[str, tuple[torch.Size, torch.dtype]],
    ) -> dict[str, Tensor]:
        """Tensors to read a checkpoint's file into, sharded as `tensors`, the state's own by file and name,
        are.

        Args:
            stored: shape and dtype of each of the file's tensors.
        """
        like = tensors.get(file, {})
        if file == "optimizer":  # a new optimizer has no moments: they are sharded as their parameters
            parameters = dict(self.model.named_parameters())
            like = {name: parameters[name.rsplit("/", 1)[0]] for name in stored}
        return {name: _empty_like(like.get(name), *info) for name, info in stored.items()}

    def load(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any], source: Path) -> None:
        """Loads what `state_dict` returned; strict.

        Raises:
            ValueError: a tensor of the model is missing, unexpected or of another shape.
        """
        own = self.model.state_dict()
        weights = {n: distribute_like(t, own[n]) if n in own else t for n, t in tensors["model"].items()}
        load_strict(self.model, weights, source)
        ema = numbers["ema"]
        self.ema.config = replace(self.ema.config, decay=ema["decay"], update_every=ema["update_every"])
        self.ema.updates = ema["updates"]
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
        for key, tensor in moments.items():
            name, moment = key.rsplit("/", 1)
            load_moment(owners[names[name]], names[name], moment, tensor)


def _empty_like(like: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor, sharded as `like` where that has the same shape; else full and on the CPU."""
    if like is not None and like.shape == shape:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)

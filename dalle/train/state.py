"""All that changes while training, as named tensors and plain numbers.

Random numbers, the learning rate and the place in the data are not among it: they follow from seed and step.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dalle.train.dtensor import placed
from dalle.train.ema import EMA
from dalle.train.grad_scaler import PerBlockGradScaler
from dalle.train.moments import plain, put


class Stateful(Protocol):
    """A part of training with a memory of its own.

    A tensor that differs between processes is a DTensor over them (`sharded.of_each_process` makes one). After a
    change of their number it comes back whole, (processes that were, ...).
    """

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, by name."""
        ...

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Puts them back in place."""
        ...

    def numbers(self) -> dict[str, Any]:
        """What is no tensor."""
        ...

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        """Puts them back."""
        ...


@dataclass
class TrainState:
    """All that changes while training."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    ema: EMA
    scales: PerBlockGradScaler | None = None
    step: int = 0
    extras: dict[str, Stateful] = field(default_factory=dict)
    """Whatever else has a memory, by name."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor, by file and name; a slice where parameters are sliced."""
        scales = {"scales": self.scales.state_dict()} if self.scales else {}
        extras = {name: part.state_dict() for name, part in self.extras.items()}
        held = {"model": self.model.state_dict(), "ema": self.ema.sums, "optimizer": _moments(self)}
        return held | scales | {name: tensors for name, tensors in extras.items() if tensors}

    def numbers(self) -> dict[str, Any]:
        """Everything that is no tensor."""
        ema = {"decay": self.ema.config.decay, "every": self.ema.config.every, "updates": self.ema.updates}
        extras = {name: part.numbers() for name, part in self.extras.items()}
        return {"step": self.step, "ema": ema} | ({"extras": extras} if extras else {})

    def targets(
        self, found: dict[str, dict[str, tuple[torch.Size, torch.dtype]]]
    ) -> dict[str, dict[str, Tensor]]:
        """Tensors to fill with what a checkpoint holds, shared over processes as the state's own are.

        Args:
            found: shape and dtype of what is there, by file and name.
        """
        like = self.tensors() | {"optimizer": _parameters_of_moments(self, found.get("optimizer", {}))}
        return {
            file: {name: _target(like.get(file, {}).get(name), *info) for name, info in infos.items()}
            for file, infos in found.items()
        }

    def load(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any], source: Path) -> None:
        """Puts all of it back; strict.

        Raises:
            ValueError: a tensor of the model is missing, left over or misshapen.
        """
        load_strict(self.model, tensors["model"], source)
        ema = numbers["ema"]
        self.ema.config = replace(self.ema.config, decay=ema["decay"], every=ema["every"])
        self.ema.updates = ema["updates"]
        for name, tensor in tensors["ema"].items():
            self.ema.sums[name].copy_(placed(tensor, self.ema.sums[name]))
        _load_moments(self, tensors["optimizer"])
        if self.scales and "scales" in tensors:
            self.scales.load_state_dict(tensors["scales"])
        for name, part in self.extras.items():
            if name in numbers.get("extras", {}):  # else it is new to the run
                part.load_state_dict(tensors.get(name, {}))
                part.load_numbers(numbers["extras"][name])
        self.step = numbers["step"]


def load_strict(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Weights into a model; ValueError that names the first missing, extra or misshapen tensor."""
    own = model.state_dict()
    if missing := sorted(own.keys() - tensors.keys()):
        raise ValueError(f"{source} lacks {len(missing)} tensors of the model, first {missing[0]!r}")
    if extra := sorted(tensors.keys() - own.keys()):
        raise ValueError(f"{source} holds {len(extra)} tensors the model lacks, first {extra[0]!r}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{source}: {name!r} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
            )
    model.load_state_dict({name: placed(tensor, own[name]) for name, tensor in tensors.items()})


def _moments(state: TrainState) -> dict[str, Tensor]:
    """The optimizers' moments, "parameter/moment"."""
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        f"{names[parameter]}/{name}": tensor
        for optimizer in state.optimizers
        for parameter, moments in optimizer.state.items()
        for moment, value in moments.items()
        for name, tensor in plain(moment, value).items()
    }


def _load_moments(state: TrainState, moments: dict[str, Tensor]) -> None:
    names = dict(state.model.named_parameters())
    owners = {p: o for o in state.optimizers for group in o.param_groups for p in group["params"]}
    for key, tensor in moments.items():
        name, moment = key.rsplit("/", 1)
        put(owners[names[name]], names[name], moment, tensor)


def _parameters_of_moments(state: TrainState, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameter that each "parameter/moment" belongs to."""
    parameters = dict(state.model.named_parameters())
    return {name: parameters[name.rsplit("/", 1)[0]] for name in names}


def _target(like: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor placed as another one of the same shape is; without one, whole and on the CPU."""
    if like is not None and like.shape == shape:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)

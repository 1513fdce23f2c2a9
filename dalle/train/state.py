"""All that changes while training, as named tensors and plain numbers.

Random numbers and the place in the data are not among it: they follow from seed and step.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dalle.train.ema import AveragedWeights, EMAConfig
from dalle.train.scaling import GradientScales
from dalle.train.shards import placed, whole


class Stateful(Protocol):
    """A part of training with a memory of its own."""

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
    ema: AveragedWeights
    scales: GradientScales | None = None
    step: int = 0
    extras: dict[str, Stateful] = field(default_factory=dict)
    """Whatever else has a memory, by name."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor, by file and name, whole: where parameters are sliced, every process must ask."""
        scales = {"scales": self.scales.state_dict()} if self.scales else {}
        extras = {name: part.state_dict() for name, part in self.extras.items()}
        held = {"model": self.model.state_dict(), "ema": self.ema.sums, "optimizer": _moments(self)}
        held |= scales | {name: tensors for name, tensors in extras.items() if tensors}
        return {file: {name: whole(tensor) for name, tensor in tensors.items()} for file, tensors in held.items()}

    def numbers(self) -> dict[str, Any]:
        """Everything that is no tensor."""
        ema = {"decay": self.ema.config.decay, "every": self.ema.config.every, "updates": self.ema.updates}
        extras = {name: part.numbers() for name, part in self.extras.items()}
        return {"step": self.step, "ema": ema} | ({"extras": extras} if extras else {})

    def load(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any], source: Path) -> None:
        """Puts all of it back; strict.

        Raises:
            ValueError: a tensor of the model is missing, left over or misshapen.
        """
        load_strict(self.model, tensors["model"], source)
        self.ema.config = EMAConfig(numbers["ema"]["decay"], numbers["ema"]["every"])
        self.ema.updates = numbers["ema"]["updates"]
        for name, tensor in tensors["ema"].items():
            self.ema.sums[name].copy_(placed(tensor, self.ema.sums[name]))
        _load_moments(self, tensors["optimizer"])
        if self.scales:
            self.scales.load_state_dict(tensors["scales"])
        for name, part in self.extras.items():
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
            raise ValueError(f"{source}: {name!r} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
    model.load_state_dict({name: placed(tensor, own[name]) for name, tensor in tensors.items()})


def _moments(state: TrainState) -> dict[str, Tensor]:
    """The optimizers' moments, "parameter/moment"."""
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        f"{names[parameter]}/{moment}": value
        for optimizer in state.optimizers
        for parameter, moments in optimizer.state.items()
        for moment, value in moments.items()
    }


def _load_moments(state: TrainState, moments: dict[str, Tensor]) -> None:
    names = dict(state.model.named_parameters())
    owners = {p: o for o in state.optimizers for group in o.param_groups for p in group["params"]}
    for key, tensor in moments.items():
        name, moment = key.rsplit("/", 1)
        parameter = names[name]
        like = tensor if moment == "step" else parameter  # the fused kernel wants the parameter's strides
        value = torch.empty_like(like, dtype=tensor.dtype, device=parameter.device)
        owners[parameter].state[parameter][moment] = value.copy_(placed(tensor, value))

"""Published checkpoint formats: detection by tensor names, comparison of keys, strict loading.

A format takes every size from the shapes of the tensors, since file names and separate YAML files are often
lost. A tensor that is neither in the model nor on the format's list of ignored ones is an error.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor, nn

from dalle.config import LAYERS
from dalle.meta_device import SkipRandomInit

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class CheckpointFormat:
    """One published format."""

    name: str  # display name
    kind: str
    """Of its model: "image tokenizer", "scorer", "transformer", "diffusion" or "classifier"."""
    license: str  # of the published weights, as far as known
    key_patterns: tuple[str, ...]  # patterns of tensor names; a file has this format if each matches a name
    infer_config: Callable[[Shapes, "DetectedCheckpoint"], Any]
    """Shapes by the model's names, and the file -> configuration; ValueError for what is not supported."""
    build: Callable[[Any], nn.Module]  # configuration -> a model without the file's weights
    renames: Callable[[Collection[str]], Mapping[str, str]] = lambda names: {}
    """The file's names -> regular expressions and what replaces them in each name, in this order."""
    ignored: tuple[str, ...] = ()
    """Patterns of names that a model has no use for: training losses, masks that are computed."""

    def matches(self, names: Collection[str]) -> bool:
        """Whether a file with tensors of these names has this format."""
        return all(count_matches(names, pattern) for pattern in self.key_patterns)

    def rename(self, names: Collection[str]) -> dict[str, str]:
        """The model's name by the file's name of each tensor that is not ignored."""
        renames, renamed = self.renames(names), {}
        for name in names:
            if not any(fnmatchcase(name, pattern) for pattern in self.ignored):
                renamed[name] = name
                for pattern, new in renames.items():
                    renamed[name] = re.sub(pattern, new, renamed[name])
        return renamed


@dataclass(frozen=True)
class DetectedCheckpoint:
    """A file or folder of another program, and its format."""

    path: Path
    family: CheckpointFormat | None  # None if it is unknown
    tensors: Mapping[str, Tensor]
    tree: Any = None  # all of the file
    container: str = ""  # see `dalle.io.torch_file`


@dataclass(frozen=True)
class KeyComparison:
    """A file's tensors against the model of their shapes."""

    config: Any
    model: nn.Module  # on the meta device
    tensors: dict[str, Tensor]  # by the model's names
    faults: dict[str, list[str]]  # names that are missing, unexpected, of wrong_shape or of wrong_dtype
    ignored: list[str]

    def check(self, source: Path | str) -> None:
        """ValueError unless the file fills the model exactly."""
        for fault, names in self.faults.items():
            if names:
                kind = "lacks" if fault == "missing" else f"has {fault.replace('_', ' ')}:"
                raise ValueError(f"{source} {kind} {len(names)} tensors, first {names[0]}")


def compare_keys(found: DetectedCheckpoint) -> KeyComparison:
    """Compares a file with its format's model; ValueError for sizes that the model cannot have."""
    family, tensors = found.family, {}
    renamed = family.rename(found.tensors)
    for name, new in renamed.items():
        if new in tensors:
            raise ValueError(f"two tensors have the name {new}, one of them {name}")
        tensors[new] = found.tensors[name]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        config = family.infer_config(shapes, found)
        if (layers := max(getattr(config, name, 0) for name in LAYERS)) > len(shapes):
            raise ValueError(f"{len(shapes)} tensors are too few for {layers} layers")
        with torch.device("meta"), SkipRandomInit():
            model = family.build(config)
    except KeyError as error:
        raise ValueError(f"it lacks {error.args[0]}") from None
    except Exception as error:
        if isinstance(error, ValueError) and "to unpack" not in str(error):  # of a shape
            raise
        raise ValueError(f"a tensor has impossible dimensions: {error!s:.80}") from None
    state = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    both = sorted(shapes.keys() & expected.keys())
    other = [n for n in both if tensors[n].is_floating_point() != state[n].is_floating_point()]
    faults = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "wrong_shape": [f"{n}: {shapes[n]}, not {expected[n]}" for n in both if shapes[n] != expected[n]],
        "wrong_dtype": [f"{n}: {tensors[n].dtype}, not {state[n].dtype}" for n in other],
    }
    return KeyComparison(config, model, tensors, faults, sorted(found.tensors.keys() - renamed.keys()))


def load_weights(found: DetectedCheckpoint) -> nn.Module:
    """The format's frozen model in fp32 with a file's weights; ValueError for weights that do not fill it."""
    try:
        comparison = compare_keys(found)
    except ValueError as error:
        raise ValueError(f"{found.path}, of {found.family.name}, is not supported: {error}") from None
    comparison.check(found.path)
    model, state = comparison.model, {}
    for name, tensor in comparison.tensors.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        state[name] = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)  # unmaps the file
        if tensor.is_floating_point() and not torch.isfinite(state[name]).all():
            raise ValueError(f"{found.path}: {name} holds NaN or infinite values")
    model.load_state_dict(state, assign=True)
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"{left} are neither in the state dict nor made on the CPU"
    return model.eval().requires_grad_(False)


def count_matches(names: Collection[str], pattern: str) -> int:
    """How many names match."""
    return sum(fnmatchcase(name, pattern) for name in names)


def hparam(hparams: Mapping[str, Any], name: str, default: int | bool | None = None) -> Any:
    """A hyper-parameter: true or false if the default is, else a positive number; ValueError for another."""
    value, switch = hparams.get(name, default), type(default) is bool
    if type(value) is not (bool if switch else int) or not (switch or 0 < value < 2**31):
        expected = "true or false" if switch else "a positive number"
        raise ValueError(f"its hparams have {name} {shown(value):.40}, expected {expected}")
    return value

"""What each reader tells of its format, and the comparison of a file with the model it should fill.

A reader recognizes its format by names of tensors, takes every size from their shapes (file names and separate
YAML files are often lost), and loads strictly: what is neither in the model nor on its list of things to leave
out is an error. Programs that load what happens to match run half-empty models without a word.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class CheckpointFormat:
    """One published format."""

    name: str
    """For people."""
    kind: str
    """What it is here: "image tokenizer", "scorer" or "transformer"."""
    licence: str
    """Of the published weights, as far as known; a file of one's own making may have another."""
    marks: tuple[str, ...]
    """Patterns of names; it is this family if each is met."""
    configure: Callable[[Shapes], Any]
    """Own names and shapes -> configuration; ValueError for what cannot be held."""
    build: Callable[[Any], nn.Module]
    """Configuration -> a model without the file's weights."""
    vocabulary: Callable[[Any], str]
    """Configuration -> what its ids are."""
    rename: Callable[[str], str] = lambda name: name
    """The file's name of a tensor -> the model's."""
    ignored: tuple[str, ...] = ()
    """Patterns of names, of the file, that a model has no use for: losses of training, masks made anew."""
    settle: Callable[["CheckpointFormat", Path, Any, Mapping[str, Tensor]], "CheckpointFormat"] | None = None
    """Itself, the file, all that lies in it, its tensors -> itself with what no single name or shape tells."""

    def recognizes(self, names: Iterable[str]) -> bool:
        """Whether a file with tensors of these names is of this family."""
        names = list(names)
        return all(any(fnmatchcase(name, mark) for name in names) for mark in self.marks)


@dataclass(frozen=True)
class KeyComparison:
    """How a file's tensors compare with the model that their shapes call for."""

    config: Any
    parameters: int
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    mistyped: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def check(self, source: Path | str) -> None:
        """ValueError unless the file fills the model exactly."""
        for names, fault in (
            (self.missing, "lacks"),
            (self.extra, "holds, beside the model,"),
            (self.misshapen, "holds in another shape than the rest calls for"),
            (self.mistyped, "holds in another kind of number than the model"),
        ):
            if names:
                raise ValueError(f"{source} {fault} {len(names)} tensors, first {names[0]}")


def compare_keys(family: CheckpointFormat, tensors: Mapping[str, Tensor]) -> KeyComparison:
    """Compares a file with the model of its family, without reading a number of it (but ruDALL-E's masks).

    Raises:
        ValueError: sizes that the family's model cannot have.
    """
    kept, ignored = _own_names(family, tensors)
    found = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    config, model = _empty_model(family, found)
    state = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    both = sorted(found.keys() & expected.keys())
    other = [n for n in both if kept[n].dtype.is_floating_point != state[n].is_floating_point()]
    return KeyComparison(
        config=config,
        parameters=sum(p.numel() for p in model.parameters()),
        missing=sorted(expected.keys() - found.keys()),
        extra=sorted(found.keys() - expected.keys()),
        misshapen=[f"{n}: {found[n]}, not {expected[n]}" for n in both if found[n] != expected[n]],
        mistyped=[f"{n}: {kept[n].dtype}, not {state[n].dtype}" for n in other],
        ignored=ignored,
    )


def load_weights(family: CheckpointFormat, tensors: Mapping[str, Tensor], source: Path | str) -> nn.Module:
    """The family's model with a file's weights, in fp32 and eval mode, its parameters frozen.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape, or whole numbers where the model has none.
    """
    try:
        comparison = compare_keys(family, tensors)
    except ValueError as error:
        raise ValueError(f"{source}, of {family.name}, cannot be held here: {error}") from None
    comparison.check(source)
    with without_values():
        model = family.build(comparison.config)
    floats = {}
    for name, tensor in _own_names(family, tensors)[0].items():
        value = tensor.clone(memory_format=torch.contiguous_format)  # no longer mapped from the file
        if value.is_floating_point():
            value = value.float()
            if not torch.isfinite(value).all():
                raise ValueError(f"{source}: {name} holds NaN or infinite values")
        floats[name] = value
    model.load_state_dict(floats, assign=True)
    _leave_meta(model, source)
    return model.eval().requires_grad_(False)


@contextmanager
def without_values() -> Iterator[None]:
    """Modules made here have shapes and no numbers, whatever their size."""
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    """Leaves out drawing initial weights: without numbers it does nothing, but torch imports 900 modules for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def _empty_model(family: CheckpointFormat, shapes: Shapes) -> tuple[Any, nn.Module]:
    """(configuration, a model without values) for the shapes of a file."""
    try:
        config = family.configure(shapes)
        with without_values():
            return config, family.build(config)
    except KeyError as error:
        raise ValueError(f"it looks like {family.name}, but lacks {error.args[0]}") from None
    except ValueError as error:
        if "to unpack" not in str(error):  # of a shape
            raise
        raise ValueError(
            f"it looks like {family.name}, but a tensor has too many or few dimensions: {error}"
        ) from None
    except (RuntimeError, ArithmeticError, IndexError, TypeError, AssertionError) as error:
        raise ValueError(f"it looks like {family.name}, but has impossible sizes: {error}") from None


def _own_names(
    family: CheckpointFormat, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """(by the model's names, names left out)."""
    ignored = [name for name in tensors if any(fnmatchcase(name, pattern) for pattern in family.ignored)]
    left_out = set(ignored)
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in left_out:
            own = family.rename(name)
            if own in kept:
                raise ValueError(f"two tensors stand for {own}, one of them {name}")
            kept[own] = tensor
    return kept, sorted(ignored)


def _leave_meta(model: nn.Module, source: Path | str) -> None:
    """What a file does not hold (buffers made anew) must not have been left without values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise AssertionError(f"{source}: {name} was made without values; build it outside of the state")

"""What the names in a checkpoint's pickle stand for: plain data, made by stand-ins that reach nowhere.

A name that is neither in MAKERS nor `is_held` is not data, and dalle/pretrained/safe_pickle.py refuses the file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Name:
    """A class or function of another program, by name alone."""

    full: str


@dataclass(eq=False)
class Held:
    """An object of a class that is not made: its name, its arguments and its attributes."""

    kind: str
    arguments: tuple = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    """Entries, where the class is a dict."""


@dataclass(frozen=True)
class Storage:
    """A run of numbers somewhere in the file."""

    dtype: torch.dtype
    read: Callable[[], Tensor]
    """The numbers, flat."""
    count: int
    """How many."""


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of the file: what it is, and how to read it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}

NUMBER_FORMATS = {
    f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
"""Names of the number formats themselves."""

OLD = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
}  # names of Python 2, which protocols 0 to 2 still write


def _view(storage: Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> SavedTensor:
    """A tensor over a storage; ValueError if it reaches beyond it."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor without a storage, or with sizes that are no numbers")
    if len(shape) != len(stride):
        raise ValueError(f"a tensor of shape {shape} with strides {stride}")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if count and (last >= storage.count or count > max(storage.count, 2**20)):
        raise ValueError(f"a tensor of shape {shape} over a storage of {storage.count} numbers")

    def read() -> Tensor:
        return storage.read().as_strided(shape, stride, offset).contiguous()

    return SavedTensor(storage.dtype, tuple(shape), read)


def _view_as(
    storage: Storage, offset: int, shape: tuple, stride: tuple, grad: Any, hooks: Any, dtype: Any, *_: Any
):
    """The form in which newer number formats are written: untyped bytes and a dtype."""
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of unknown number format {shown(dtype):.80}")
    typed = Storage(dtype, lambda: storage.read().view(dtype), storage.count // dtype.itemsize)
    return _view(typed, offset, shape, stride)


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise ValueError(f"text in encoding {shown(encoding):.40}")
    return text.encode(encoding)


def key(value: Any) -> Any:
    """What dictionaries and sets are found by: no tuple of tuples, whose hash may take for ever."""
    if type(value) in (tuple, frozenset) and any(type(inner) in (tuple, frozenset) for inner in value):
        raise ValueError("a key that is a tuple of tuples")
    return value


def _device(*words: Any) -> str:
    if {*map(type, words)} - {str, int}:
        raise ValueError("a device that is neither a name nor a number")
    return ":".join(map(str, words))


def _object(kind: Any, *_: Any) -> Held:
    if not isinstance(kind, Name):
        raise ValueError("an object without a class")
    return Held(kind.full)


MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "collections.defaultdict": lambda default=None: {},
    "builtins.set": lambda values=(): set(map(key, values)),
    "builtins.frozenset": lambda values=(): frozenset(map(key, values)),
    "builtins.bytearray": lambda text=b"", encoding="latin1": (
        _encode(text, encoding) if type(text) is str else text
    ),
    "builtins.complex": complex,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _object,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view_as,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.nn.parameter.Parameter": lambda data, *_: data,
}
"""What may be called, and what is done instead. None of it reaches beyond its arguments."""

HELD = {
    "builtins.object",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "typing.Any",
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "list", "dict", "tuple")),
    *(
        f"torch.nn.modules.{name}"
        for name in (
            "container.Sequential",
            "activation.ReLU",
            "pooling.MaxPool2d",
            "linear.Identity",
            "upsampling.Upsample",
        )
    ),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
}
"""Classes whose objects are kept as `Held`: the dVAE's own, and what trainers leave beside the weights."""

HELD_BELOW = ("omegaconf.", "pytorch_lightning.", "lightning.")
"""Packages of which the same holds: Lightning writes its callbacks and settings into every checkpoint."""


def is_held(name: str) -> bool:
    """Whether objects of a class are kept as data."""
    return name in HELD or name.startswith(HELD_BELOW)

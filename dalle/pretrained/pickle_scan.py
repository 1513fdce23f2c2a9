"""Static scan of a pickle: the globals that it names and the sizes that it claims, before torch loads it.

`torch.load(weights_only=True)` runs no code, but stops at the first global that it does not know, allocates what a file
claims, and hashes any key. The scan follows the stack through `pickletools` without making a single object. It names
every forbidden global, in protocols 0 to 5, and refuses tensors beyond their storage and tuples that are exponential.
"""

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

ITEM_SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1}
ITEM_SIZES = {f"torch.{name}Storage": size for name, size in (ITEM_SIZES | {"Byte": 1, "Bool": 1}).items()}
ITEM_SIZES["torch.storage.UntypedStorage"] = 1
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
REBUILDS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
CALLED = REBUILDS | {
    "collections.OrderedDict",
    "builtins.set",
    "builtins.bytearray",
    "builtins.complex",
    "_codecs.encode",
    "torch.Size",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
}
"""What torch calls for data; none of it reaches beyond its arguments."""
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2, in protocols 0 to 2
MAX_TUPLE = 10_000
"""Values of a tuple, with those of the tuples inside it, each counted as often as it occurs."""


class Forbidden(ValueError):
    """The file names a global that is not data."""


class Item(NamedTuple):
    """A value on the stack, as far as the scan knows it."""

    value: Any = None
    """A literal, a tuple of Items, a Global, Instance or Storage; None for all else."""
    start: int = 0
    """Position of the first instruction that makes it."""
    size: int = 1
    """Values in a tuple, all levels."""


@dataclass(frozen=True)
class Global:
    """A class or function by name."""

    name: str


@dataclass(frozen=True)
class Instance:
    """The result of calling a global."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A storage outside of the pickle."""

    key: str
    count: int
    """Numbers in it."""
    item_size: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.count * self.item_size


@dataclass
class ScannedPickle:
    """What a scan finds."""

    stand_ins: set[str] = field(default_factory=set)
    """Classes whose instances are kept as data."""
    storages: dict[str, Storage] = field(default_factory=dict)
    literals: set[Any] = field(default_factory=set)
    """Texts and numbers."""
    modules: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Legacy files keep the source of a class beside it: start and end of both, then of the class alone."""
    protocol: int = 0
    value: Any = None


def scan_pickle(stream: Any, is_stand_in: Callable[[str], bool], limit: int) -> ScannedPickle:
    """Scans one pickle, from where the stream stands to its end mark.

    Args:
        stream: bytes with `read`, `readline` and `tell`.
        is_stand_in: whether the instances of a class are kept as data.
        limit: numbers in a storage at most.

    Raises:
        Forbidden: a global that is not data; the message names it.
        ValueError: no pickle, a broken one, or impossible sizes.
    """
    scanner = _Scanner(is_stand_in, limit)
    try:
        for opcode, argument, position in pickletools.genops(stream):
            scanner.step(opcode, argument, position)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        scanner.refuse()
        raise ValueError(f"a broken pickle: {error or type(error).__name__}") from None
    scanner.refuse()
    if scanner.error:
        raise scanner.error
    return scanner.found


class _Scanner:
    def __init__(self, is_stand_in: Callable[[str], bool], limit: int):
        self.is_stand_in, self.limit = is_stand_in, limit
        self.stack: list[Item] = []
        self.memo: dict[int, Item] = {}
        self.forbidden: dict[str, None] = {}
        self.found = ScannedPickle()
        self.error: ValueError | None = None  # the first; names are looked for to the end

    def refuse(self) -> None:
        """Raises Forbidden if the pickle names what is not data."""
        if names := list(self.forbidden):
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise Forbidden(f"it asks for {', '.join(names[:5])}{more}, which could run code")

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any, position: int) -> None:
        """Follows one instruction; `pickletools` knows what it takes from the stack and leaves on it."""
        name = opcode.name
        if name == "PROTO":
            self.found.protocol = argument
        elif name.endswith("PUT") or name == "MEMOIZE":
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name.endswith("GET"):
            self.stack.append(self.memo[argument]._replace(start=position))
        elif name.startswith("EXT"):
            raise ValueError(f"instruction {name}, which checkpoints do not use")
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name == "MARK":
            self.stack.append(Item(pickletools.markobject, position))
        else:
            taken = self.take(opcode.stack_before)
            start = min((item.start for item in taken), default=position)
            for _ in opcode.stack_after:
                try:
                    self.stack.append(self.result(name, argument, taken, start, position))
                except ValueError as error:
                    self.error = self.error or error
                    self.stack.append(Item(None, start))
        if name == "STOP":
            self.found.value = taken[-1].value

    def take(self, kinds: list) -> list[Item]:
        """The values that an instruction takes, those after a mark included; the mark stays first among them."""
        items: list[Item] = []
        if pickletools.markobject in kinds:
            while not items or items[0].value is not pickletools.markobject:
                items.insert(0, self.stack.pop())
            kinds = kinds[: kinds.index(pickletools.markobject)]
        for _ in kinds:
            items.insert(0, self.stack.pop())
        return items

    def result(self, name: str, argument: Any, taken: list[Item], start: int, position: int) -> Item:
        """What an instruction leaves on the stack."""
        values = [item for item in taken if item.value is not pickletools.markobject]
        if name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            words = argument.split(" ", 1) if argument else [str(item.value) for item in values[-2:]]
            return Item(self.name(*words), start)
        if "TUPLE" in name:
            size = 1 + sum(item.size for item in values)
            if size > MAX_TUPLE:
                raise ValueError(f"a tuple of more than {MAX_TUPLE} values, its tuples included")
            return Item(tuple(values), start, size)
        if name.endswith("PERSID"):
            return Item(self.persistent(values[0].value, start, position + 1), start)
        if name in ("REDUCE", "NEWOBJ", "OBJ", "NEWOBJ_EX"):
            return Item(self.call(values[0].value, values[1].value if len(values) > 1 else ()), start)
        if name == "BUILD" and not self.has_attributes(values[0].value):
            raise ValueError("attributes of what has none")
        if not taken and argument is not None:
            self.found.literals.add(argument if isinstance(argument, str | int) else None)
            return Item(argument, start)
        return (
            values[0] if name in ("BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS") else Item(None, start)
        )

    def name(self, module: str, name: str) -> Global:
        full = f"{RENAMED.get(module, module)}.{name}"
        if self.is_stand_in(full):
            self.found.stand_ins.add(full)
        elif full not in CALLED and full not in ITEM_SIZES and full not in DTYPES:
            self.forbidden[ascii(f"{module}.{name}")[1:-1][:200]] = None
        return Global(full)

    def has_attributes(self, value: Any) -> bool:
        return isinstance(value, Instance) and (
            value.name == "collections.OrderedDict" or value.name in self.found.stand_ins
        )

    def call(self, function: Any, arguments: Any) -> Instance | Item:
        if not isinstance(function, Global) or function.name in ITEM_SIZES or function.name in DTYPES:
            raise ValueError("a call of what is no function")
        if function.name in REBUILDS:
            _check_tensor(*map(_plain, arguments))
        elif function.name in ("_codecs.encode", "builtins.bytearray") and arguments:
            text, encoding = ([_plain(item) for item in arguments] + ["latin1"])[:2]
            if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
                raise ValueError(f"bytes of {type(text).__name__} in encoding {encoding!r:.40}")
        return Instance(function.name)

    def persistent(self, identity: Any, start: int, end: int) -> Any:
        """A storage, or in a legacy file a class with its source."""
        kind, what, *rest = identity if type(identity) is tuple and len(identity) > 1 else (Item(), Item())
        if kind.value == "module" and isinstance(what.value, Global) and rest:
            self.found.modules.append((start, end, what.start, rest[0].start))
            return what.value
        key, _, count, view = (_plain(item) for item in (*rest, Item())[:4]) if len(rest) > 2 else (None,) * 4
        item_size = ITEM_SIZES.get(getattr(what.value, "name", None))
        if kind.value != "storage" or item_size is None or type(key) not in (str, int) or view is not None:
            raise ValueError("a reference to something outside of the file")
        if type(count) is not int or not 0 <= count <= self.limit:
            raise ValueError(
                f"a storage of {count} numbers in a file of {self.limit} bytes: truncated or absurd"
            )
        storage = Storage(str(key), count, item_size)
        if self.found.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {storage.key} in two sizes")
        return storage


def _plain(item: Item) -> Any:
    return tuple(map(_plain, item.value)) if type(item.value) is tuple else item.value


def _check_tensor(
    storage: Any, offset: Any = None, shape: Any = None, stride: Any = None, *rest: Any
) -> None:
    """ValueError for a tensor that reaches beyond its storage."""
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor without storage, shape or strides")
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *stride)) or len(shape) != len(stride):
        raise ValueError(f"a tensor of shape {shape} with strides {stride} at {offset}")
    dtype = DTYPES.get(getattr(rest[2], "name", None)) if len(rest) > 2 else None
    capacity = storage.nbytes // dtype.itemsize if dtype else storage.count
    count, last = (
        math.prod(shape),
        offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)),
    )
    if count and (last >= capacity or count > max(capacity, 2**20)):
        raise ValueError(f"a tensor of shape {shape} over a storage of {capacity} numbers")

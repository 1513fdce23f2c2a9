"""Static scan of a pickle: the globals that it names and the sizes that it claims, before torch loads it.

`torch.load(weights_only=True)` runs no code, but stops at the first unknown global, allocates what a file
claims, and hashes any key. The scan simulates the stack by `pickletools` without making objects. It names
every forbidden global, in protocols 0 to 5, and refuses tensors beyond their storage and tuples of
exponential size.
"""

import math
import pickletools
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

SIZES = {
    8: ["Double", "Long"],
    4: ["Float", "Int"],
    2: ["Half", "BFloat16", "Short"],
    1: ["Char", "Byte", "Bool"],
}
ITEM_SIZES = {f"torch.{name}Storage": size for size, names in SIZES.items() for name in names}
ITEM_SIZES["torch.storage.UntypedStorage"] = 1
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
REBUILDS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
CALLED = REBUILDS | {
    *("collections.OrderedDict", "builtins.set", "builtins.bytearray", "builtins.complex", "_codecs.encode"),
    *("torch.Size", "torch.device", "torch.nn.parameter.Parameter"),
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
}
"""What torch calls for data; none of it reaches beyond its arguments."""
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2, in protocols 0 to 2
MAX_TUPLE = 10_000  # values of a tuple at all levels, each counted as often as it occurs
MARK = pickletools.markobject


class Forbidden(ValueError):
    """The file names a global that is not data."""


class Item(NamedTuple):
    """A value on the stack: a literal, a tuple of Items, a Global, Instance or Storage, else None."""

    value: Any
    start: int  # position of the first instruction that makes it
    size: int = 1  # values in a tuple, at all levels

    def plain(self) -> Any:
        """The value, with tuples of values for tuples of Items."""
        return tuple(item.plain() for item in self.value) if type(self.value) is tuple else self.value


Global = namedtuple("Global", "name")  # a class or function
Instance = namedtuple("Instance", "name")  # the result of calling a global
Storage = namedtuple("Storage", "key count nbytes")  # outside of the pickle


@dataclass
class ScannedPickle:
    """Findings of a scan."""

    stand_ins: set[str] = field(default_factory=set)  # classes whose instances are kept as data
    storages: dict[str, Storage] = field(default_factory=dict)
    literals: set[Any] = field(default_factory=set)  # strings and integers
    modules: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Classes that a legacy file keeps with their source: start and end of both, then of the class."""
    protocol: int = 0
    value: Any = None


def scan_pickle(stream: Any, is_stand_in: Callable[[str], Any], limit: int) -> ScannedPickle:
    """Scans one pickle from the position of a binary stream; `limit` is the most numbers in a storage.

    Raises:
        Forbidden: a global that is not data; the message names it.
        ValueError: no pickle, a broken one, or impossible sizes.
    """
    scanner = _Scanner(is_stand_in, limit)
    try:
        for opcode, argument, position in pickletools.genops(stream):
            scanner.step(opcode, argument, position)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        scanner.error = scanner.error or ValueError(f"a broken pickle: {error or type(error).__name__}")
    if names := list(scanner.forbidden):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise Forbidden(f"it asks for {', '.join(names[:5])}{more}, which could run code")
    if scanner.error:
        raise scanner.error
    return scanner.found


class _Scanner:
    def __init__(self, is_stand_in: Callable[[str], Any], limit: int):
        self.is_stand_in, self.limit = is_stand_in, limit
        self.stack: list[Item] = []
        self.memo: dict[int, Item] = {}
        self.forbidden: dict[str, None] = {}
        self.found = ScannedPickle()
        self.error: ValueError | None = None  # the first; the scan for names continues

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any, position: int) -> None:
        """Simulates one instruction; `pickletools` knows what it takes from the stack and leaves on it."""
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
            self.stack.append(Item(MARK, position))
        else:
            taken = self.take(opcode.stack_before)
            start = taken[0].start if taken else position
            if name == "STOP":
                self.found.value = taken[-1].value
            for _ in opcode.stack_after:
                try:
                    self.stack.append(self.result(name, argument, taken, start, position))
                except ValueError as error:
                    self.error = self.error or error
                    self.stack.append(Item(None, start))

    def take(self, kinds: list) -> list[Item]:
        """The values that an instruction takes, those after a mark included; the mark stays among them."""
        first = len(self.stack) - len(kinds)
        if MARK in kinds:
            mark = max(i for i, item in enumerate(self.stack) if item.value is MARK)
            first = mark - kinds.index(MARK)
        if first < 0:
            raise ValueError("an empty stack")
        items = self.stack[first:]
        del self.stack[first:]
        return items

    def result(self, name: str, argument: Any, taken: list[Item], start: int, position: int) -> Item:
        """The value that an instruction leaves on the stack."""
        items = [item for item in taken if item.value is not MARK]
        if name in ("GLOBAL", "STACK_GLOBAL"):
            names = argument.split(" ", 1) if argument else [item.value for item in items]
            return Item(self.name(*names), start)
        if name == "INST":
            self.name(*argument.split(" ", 1))
        elif "TUPLE" in name:
            size = 1 + sum(item.size for item in items)
            if size > MAX_TUPLE:
                raise ValueError(f"a tuple of more than {MAX_TUPLE} values, its tuples included")
            return Item(tuple(items), start, size)
        elif name.endswith("PERSID"):
            return Item(self.persistent(items[0].value, start, position + 1), start)
        elif name in ("REDUCE", "NEWOBJ"):
            return Item(self.call(items[0].value, items[1].value), start)
        elif name == "BUILD":
            target, known = items[0].value, {"collections.OrderedDict", *self.found.stand_ins}
            if not isinstance(target, Instance) or target.name not in known:
                raise ValueError("attributes of what has none")
            return items[0]
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            return items[0]
        elif not taken and isinstance(argument, str | int):
            self.found.literals.add(argument)
        return Item(None if taken else argument, start)

    def name(self, module: str, name: str) -> Global:
        full = f"{RENAMED.get(module, module)}.{name}"
        if self.is_stand_in(full):
            self.found.stand_ins.add(full)
        elif full not in CALLED and full not in ITEM_SIZES and full not in DTYPES:
            self.forbidden[ascii(f"{module}.{name}")[1:-1][:200]] = None
        return Global(full)

    def call(self, function: Any, arguments: tuple[Item, ...]) -> Instance:
        """The result of a call, whose sizes are checked."""
        if not isinstance(function, Global) or function.name in ITEM_SIZES or function.name in DTYPES:
            raise ValueError("a call of what is no function")
        values = [item.plain() for item in arguments]
        if function.name in REBUILDS:
            _check_tensor(*values)
        elif function.name in ("_codecs.encode", "builtins.bytearray") and values:
            text, encoding = [*values, "latin1"][:2]
            if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
                raise ValueError(f"bytes of {type(text).__name__} in encoding {encoding!r:.40}")
        return Instance(function.name)

    def persistent(self, identity: Any, start: int, end: int) -> Storage | Global:
        """A storage, or in a legacy file a class with its source."""
        items = identity if type(identity) is tuple and len(identity) > 3 else (Item(None, 0),) * 4
        kind, what, key, _, *rest = (item.value for item in items)
        if kind == "module" and isinstance(what, Global):
            self.found.modules.append((start, end, items[1].start, items[2].start))
            return what
        item_size = ITEM_SIZES.get(what.name) if isinstance(what, Global) else None
        if kind != "storage" or not item_size or type(key) not in (str, int) or not rest or any(rest[1:]):
            raise ValueError("a reference to something outside of the file")
        if type(rest[0]) is not int or not 0 <= rest[0] <= self.limit:
            raise ValueError(f"a storage of {rest[0]} numbers in a file of {self.limit} bytes")
        storage = Storage(str(key), rest[0], rest[0] * item_size)
        if self.found.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {storage.key} in two sizes")
        return storage


def _check_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> None:
    """ValueError for a tensor that reaches beyond its storage."""
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor without storage, shape or strides")
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *stride)) or len(shape) != len(stride):
        raise ValueError(f"a tensor of shape {shape} with strides {stride} at {offset}")
    dtype = DTYPES.get(rest[2].name) if len(rest) > 2 and isinstance(rest[2], Global) else None
    capacity = storage.nbytes // dtype.itemsize if dtype else storage.count
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if count and (last >= capacity or count > max(capacity, 2**20)):
        raise ValueError(f"a tensor of shape {shape} over a storage of {capacity} numbers")

"""Static scan of a pickle: the globals that it names and the sizes that it claims, before torch loads it.

`torch.load(weights_only=True)` runs no code, but stops at the first unknown global, believes the sizes of
storages, and hashes any key. The scan simulates the stack by `pickletools` without making objects. It names
the forbidden globals, in protocols 0 to 5, and refuses tensors that claim more than their storage, encodings
other than pickle's own, and tuples of exponential size.
"""

import math
import pickletools
import re
from collections import namedtuple
from typing import Any, NamedTuple

import torch

TYPES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
ITEM_SIZES = {f"torch.{name}Storage": getattr(torch, f"{name}Tensor").dtype.itemsize for name in TYPES}
ITEM_SIZES["torch.storage.UntypedStorage"] = 1
ORDERED = "collections.OrderedDict"
REBUILDS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
DATA = {
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    *(ORDERED, "builtins.set", "builtins.complex", "_codecs.encode"),
    *("torch.Size", "torch.device", "torch.nn.parameter.Parameter"),
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    *REBUILDS,
    *ITEM_SIZES,
}
"""What torch takes or calls for data; none of it reaches beyond its arguments."""
STAND_INS = re.compile(
    r"dall_e\.\w+\.\w+"  # OpenAI's dVAE
    r"|torch\.nn\.modules\.\w+\.\w+"
    r"|(__torch__|omegaconf|pytorch_lightning|lightning)\..+"  # TorchScript; what Lightning adds
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray)"
    r"|builtins\.(object|int|float|str|bool|list|dict|tuple)"
    r"|pathlib\.(_local\.)?(Posix|Windows)Path"
    r"|argparse\.Namespace|typing\.Any|collections\.defaultdict"
)
"""Classes whose instances are kept as data; none of them is imported."""
MAX_TUPLE = 10_000  # values of a tuple at all levels, each counted as often as it occurs
MARK = pickletools.markobject


class Forbidden(ValueError):
    """The file names a global that is not data."""


Global = namedtuple("Global", "name")  # a class or function
Instance = namedtuple("Instance", "name")  # the result of calling a global
Storage = namedtuple("Storage", "key nbytes")  # outside of the pickle


class Item(NamedTuple):
    """A value on the stack: a literal, tuple, Global, Instance or Storage, else None."""

    value: Any
    start: int  # position of the first instruction that makes it
    parts: tuple["Item", ...] = ()  # of a tuple
    size: int = 1  # values in a tuple, at all levels


class PickleScan:
    """Findings about one pickle, read from the position of a binary stream.

    Raises:
        Forbidden: a global that is neither in DATA nor in STAND_INS; the message names it.
        ValueError: no pickle, a broken one, or impossible sizes.
    """

    def __init__(self, stream: Any):
        self.protocol, self.value = 0, None
        self.stand_ins: set[str] = set()  # classes whose instances are kept as data
        self.storages: set[Storage] = set()
        self.literals: set[Any] = set()  # strings and numbers
        self.modules: list[tuple[int, int, int, int]] = []
        """Classes that a legacy file keeps with their source: start and end of both, then of the class."""
        self.stack: list[Item] = []
        self.marks: list[tuple[int, int]] = []  # (size of the stack, position)
        self.memo: dict[int, Item] = {}
        self.forbidden: dict[str, None] = {}  # by their first use
        error = None
        try:
            for opcode, argument, position in pickletools.genops(stream):
                self._step(opcode, argument, position)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as broken:
            error = f"a broken pickle: {broken or type(broken).__name__}"
        if names := list(self.forbidden):
            raise Forbidden(f"it asks for {', '.join(names[:5])}, which could run code")
        if error:
            raise ValueError(error)

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any, position: int) -> None:
        """Simulates one instruction; `pickletools` knows what it takes from the stack and leaves on it."""
        name, stack, takes = opcode.name, self.stack, opcode.stack_before
        if name == "PROTO":
            self.protocol = argument
        elif name == "MARK":
            self.marks.append((len(stack), position))
        elif name.endswith("PUT") or name == "MEMOIZE":
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(self.memo[argument]._replace(start=position))
        else:
            first, start = len(stack) - len(takes), position
            if MARK in takes:
                first, start = self.marks.pop()
                first -= takes.index(MARK)
            if first < 0:
                raise ValueError("an empty stack")
            taken = tuple(stack[first:])
            del stack[first:]
            if taken and MARK not in takes:
                start = taken[0].start
            if name == "STOP":
                self.value = taken[0].value
            elif opcode.stack_after:
                stack.append(self._result(name, argument, taken, start, position))

    def _result(self, name: str, argument: Any, taken: tuple[Item, ...], start: int, position: int) -> Item:
        """What an instruction leaves on the stack."""
        values = tuple(item.value for item in taken)
        match name:
            case "GLOBAL" | "INST" | "STACK_GLOBAL":
                return Item(self._global(*(argument.split(" ", 1) if argument else values)), start)
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = 1 + sum(item.size for item in taken)
                if size > MAX_TUPLE:
                    raise ValueError(f"a tuple of more than {MAX_TUPLE} values, its tuples included")
                return Item(values, start, taken, size)
            case "BINPERSID":
                return Item(self._persistent(taken[0], position + 1), start)
            case "REDUCE" | "NEWOBJ":
                return Item(_call(*values), start)
            case "BUILD" if getattr(values[0], "name", "") not in {*self.stand_ins, ORDERED}:
                raise ValueError("attributes of what has none")
            case "BUILD" | "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS":
                return taken[0]
        if not taken and isinstance(argument, str | int):
            self.literals.add(argument)
        return Item(None if taken else argument, start)

    def _global(self, module: str, name: str) -> Global:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if STAND_INS.fullmatch(full):
            self.stand_ins.add(full)
        elif full not in DATA:
            self.forbidden[ascii(f"{module}.{name}")[1:-1][:200]] = None
        return Global(full)

    def _persistent(self, item: Item, end: int) -> Storage | Global:
        """A storage, or in a legacy file a class with its source."""
        match item.value:
            case ("module", Global() as module, _, _):
                self.modules.append((item.start, end, item.parts[1].start, item.parts[2].start))
                return module
            case ("storage", Global(name), str(key) | int(key), _, int(count), *view) if not any(view):
                storage = Storage(str(key), count * ITEM_SIZES[name])
                self.storages.add(storage)
                return storage
        raise ValueError("a reference to something outside of the file")


def _call(function: Any, arguments: tuple) -> Instance:
    """The result of a call; ValueError for one that would take much memory or time."""
    if not isinstance(function, Global) or function.name in ITEM_SIZES:
        raise ValueError("a call of what is no function")
    if function.name == "_codecs.encode" and arguments[1:] != ("latin1",):
        raise ValueError(f"text in encoding {arguments[1:]!r:.40}")
    if function.name in REBUILDS and isinstance(arguments[0], Storage):
        storage, _, shape, stride, *_ = arguments
        sizes = type(shape) is type(stride) is tuple and len(shape) == len(stride)
        whole = sizes and all(type(n) is int for n in shape)
        if not whole or math.prod(shape) > max(storage.nbytes, 2**20):
            raise ValueError(f"a tensor of shape {shape} over a storage of {storage.nbytes} bytes")
    return Instance(function.name)

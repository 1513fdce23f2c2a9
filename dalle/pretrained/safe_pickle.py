"""A pickle read as data: its instructions are followed on plain values, and no name in it is ever looked up.

Python's own reader imports whatever a pickle names and calls it, which is how a downloaded file runs a command.
Here a name stays a name. The few that make plain data have a stand-in (dalle/pretrained/pickle_names.py), objects
of the classes that published checkpoints hold are kept as `Held`, their attributes as a dict, and every other name
is refused, in protocols 0 to 5, whichever instruction asks for it. Tensors are described, not read: their bytes
lie elsewhere in the file (dalle/pretrained/torch_file.py), so names and shapes cost nothing.
"""

import pickletools
from collections.abc import Callable, Iterator
from reprlib import repr as shown
from typing import Any, Protocol

from dalle.pretrained.pickle_names import DTYPES, MAKERS, NUMBER_FORMATS, OLD, Held, Name, is_held, key

MAX_SHOWN = 5


class Forbidden(ValueError):
    """The file names something that is not data."""


class Stream(Protocol):
    """Bytes that know where they are."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


def read_pickle(
    stream: Stream,
    find_storage: Callable[[Any], Any] | None = None,
    makers: dict[str, Callable[..., Any]] | None = None,
    held: Callable[[str], bool] = is_held,
) -> Any:
    """The value of one pickle, from where the stream stands to its end mark.

    Args:
        stream: the bytes.
        find_storage: what a persistent id stands for.
        makers: names that this container allows beside MAKERS.
        held: classes whose objects are kept.

    Raises:
        Forbidden: a name that is not data; the message holds it.
        ValueError: no pickle, or a broken one.
    """
    reader = _Reader(find_storage, MAKERS | (makers or {}), held)
    try:
        value = reader.run(stream)
    except Forbidden:  # of a file inside this one
        raise
    except RecursionError:
        raise ValueError("values nested too deep") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError) as error:
        reader.refuse_forbidden()
        raise ValueError(f"a broken pickle: {error or type(error).__name__}") from error
    reader.refuse_forbidden()
    return value


_MARK = object()
_VALUES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_LITERALS = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}


class _Reader:
    """A stack, a memo, and one method for each family of instructions."""

    def __init__(self, find_storage, makers, held):
        self.find_storage, self.makers, self.held = find_storage, makers, held
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.forbidden: dict[str, None] = {}

    def refuse_forbidden(self) -> None:
        """Names were met that are not data."""
        if self.forbidden:
            names = list(self.forbidden)
            more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
            raise Forbidden(f"it asks for {', '.join(names[:MAX_SHOWN])}{more}, which could run code")

    def run(self, stream: Stream) -> Any:
        for instruction, argument, _ in pickletools.genops(stream):
            name = instruction.name
            if name == "STOP":
                return self.pop()
            if method := getattr(self, f"do_{name.lower()}", None):
                method() if argument is None else method(argument)
            elif name in _LITERALS:
                self.stack.append(argument)
            elif name in _VALUES:
                self.stack.append(_VALUES[name]())
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"instruction {name}, which checkpoints do not use")
        raise ValueError("no end")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value was expected")
        return value

    def pop_mark(self) -> list[Any]:
        """The values since the last mark."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise ValueError("a mark is missing")

    # the stack and the memo

    def do_mark(self) -> None:
        self.stack.append(_MARK)

    def do_pop(self) -> None:
        self.stack.pop()

    def do_pop_mark(self) -> None:
        self.pop_mark()

    def do_dup(self) -> None:
        self.stack.append(self.stack[-1])

    def do_memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def do_get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    do_binput = do_long_binput = do_put
    do_binget = do_long_binget = do_get

    # containers

    def do_append(self) -> None:
        value = self.pop()
        self.extend([value])

    def do_appends(self) -> None:
        self.extend(self.pop_mark())

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Held):
            target.items.update(enumerate(values, start=len(target.items)))
        elif type(target) is list:
            target.extend(values)
        else:
            raise ValueError(f"entries of a {type(target).__name__}")

    def do_list(self) -> None:
        self.stack.append(self.pop_mark())

    def do_tuple(self) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def take(self, count: int) -> tuple:
        values = tuple(self.pop() for _ in range(count))
        return values[::-1]

    def do_tuple1(self) -> None:
        self.stack.append(self.take(1))

    def do_tuple2(self) -> None:
        self.stack.append(self.take(2))

    def do_tuple3(self) -> None:
        self.stack.append(self.take(3))

    def do_dict(self) -> None:
        self.stack.append(dict(_pairs(self.pop_mark())))

    def do_setitem(self) -> None:
        self.update(self.take(2))

    def do_setitems(self) -> None:
        self.update(self.pop_mark())

    def update(self, values: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict | Held):
            raise ValueError(f"keys of a {type(target).__name__}")
        (target.items if isinstance(target, Held) else target).update(_pairs(values))

    def do_additems(self) -> None:
        values = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise ValueError(f"members of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(map(key, values))

    def do_frozenset(self) -> None:
        self.stack.append(frozenset(map(key, self.pop_mark())))

    # names, calls, objects

    def do_global(self, words: str) -> None:
        module, _, name = words.partition(" ")
        self.stack.append(self.name(module, name))

    def do_stack_global(self) -> None:
        module, name = self.take(2)
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        self.stack.append(self.name(module, name))

    def name(self, module: str, name: str) -> Any:
        full = f"{OLD.get(module, module)}.{name}"
        if full in NUMBER_FORMATS:
            return NUMBER_FORMATS[full]
        if full not in self.makers and full not in DTYPES and not self.held(full):
            self.forbidden[ascii(f"{module}.{name}")[1:-1][:200]] = None
        return Name(full)

    def call(self, kind: Any, arguments: Any) -> Any:
        if not isinstance(kind, Name) or type(arguments) is not tuple:
            raise ValueError(f"a call of {shown(kind):.80}")
        if kind.full in self.makers:
            return self.makers[kind.full](*arguments)
        return Held(kind.full, arguments)  # of a forbidden name too: the file is refused when all are known

    def do_reduce(self) -> None:
        kind, arguments = self.take(2)
        self.stack.append(self.call(kind, arguments))

    do_newobj = do_reduce

    def do_newobj_ex(self) -> None:
        kind, arguments, keywords = self.take(3)
        if keywords:
            raise ValueError("an object made with named arguments")
        self.stack.append(self.call(kind, arguments))

    def do_inst(self, words: str) -> None:
        module, _, name = words.partition(" ")
        self.stack.append(self.call(self.name(module, name), tuple(self.pop_mark())))

    def do_obj(self) -> None:
        kind, *arguments = self.pop_mark()
        self.stack.append(self.call(kind, tuple(arguments)))

    def do_build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Held):
            target.state = state
        elif type(target) is not dict:  # an OrderedDict's attributes say nothing of the weights
            raise ValueError(f"attributes of a {type(target).__name__}")

    # what lies outside of the pickle

    def do_persid(self, words: str) -> None:
        self.stack.append(self.storage(words))

    def do_binpersid(self) -> None:
        self.stack.append(self.storage(self.pop()))

    def storage(self, identity: Any) -> Any:
        if self.find_storage is None:
            raise ValueError("a reference to something outside of the file")
        return self.find_storage(identity)


def _pairs(values: Any) -> Iterator[tuple[Any, Any]]:
    if len(values) % 2:
        raise ValueError("a key without a value")
    return zip(map(key, values[::2]), values[1::2], strict=True)

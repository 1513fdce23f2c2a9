"""Words of the command line: an overview, the text under each field of a dataclass, long values cut."""

import ast
import dataclasses
import errno
import inspect
import re
import textwrap
import typing
from collections.abc import Sequence
from itertools import pairwise

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo


def overview(words: Sequence[str], description: str, more: str) -> None:
    """Prints this help and exits if the command line asks for help before it names what to do."""
    if words and all(word in ("-h", "--help") for word in words):
        print(f"{description.strip()}\n\n{more}")
        raise SystemExit(0)


def field_docs() -> ConstructorRegistry:
    """Tyro rule for the text under each field as its help; tyro alone keeps the line breaks."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def read(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or not isinstance(info.default, info.type):
            return None
        docs: dict[str, str] = {}
        for owner in filter(dataclasses.is_dataclass, reversed(info.type.__mro__)):
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
            for field, text in pairwise(body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    docs[field.target.id] = " ".join(text.value.value.split())
        hints = typing.get_type_hints(info.type, include_extras=True)
        fields = []
        for name in (field.name for field in dataclasses.fields(info.type)):
            default, text = getattr(info.default, name), docs.get(name)
            fields.append(StructFieldSpec(name=name, type=hints[name], default=default, helptext=text))
        return StructConstructorSpec(instantiate=info.type, fields=tuple(fields))

    return registry


def describe(error: Exception) -> str:
    """The message of an error, long values cut, and what to do if it is that of a full disk."""
    message = re.sub(r"(\S{300})\S+", r"\1...", str(error))
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full and "disk space" not in message:
        message += "; free disk space and run the same command again"
    return message

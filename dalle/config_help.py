"""What `--help` says of a field: the text under it in the code. Tyro alone would keep the breaks of its lines."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from itertools import pairwise

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo


def whole_sentences() -> ConstructorRegistry:
    """Around `tyro.cli`: a dataclass is read as it would be, but for what is said under its fields."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def read(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or not isinstance(info.default, info.type):
            return None
        hints, told = typing.get_type_hints(info.type, include_extras=True), _sentences(info.type)
        fields = tuple(
            StructFieldSpec(
                name=name, type=hints[name], default=getattr(info.default, name), helptext=told.get(name)
            )
            for name in (field.name for field in dataclasses.fields(info.type))
        )
        return StructConstructorSpec(instantiate=info.type, fields=fields)

    return registry


def _sentences(cls: type) -> dict[str, str]:
    """What is said under each field, those of the parent classes among them, on one line."""
    found: dict[str, str] = {}
    for owner in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(text.value.value.split())
    return found

"""Configuration: frozen dataclass <-> dict <-> YAML 1.2 <-> command line, strict in each direction.

A run is described by one dataclass whose defaults are the paper's. YAML files hold only what differs;
several merge in order, and dotted overrides on the command line win wherever they stand:

    python scripts/train_dvae.py --config configs/dvae/small.yaml --train.batch-size 64

A key that does not exist is an error that names the nearest one; so is a value of the wrong type.
"""

import argparse
import ast
import dataclasses
import difflib
import errno
import inspect
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import cattrs
import tyro
from cattrs.gen import make_dict_structure_fn
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

T = TypeVar("T")
PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
"""Shipped configurations: configs/ of a checkout, or the copy inside an installed wheel."""
RESUME_FREE = {"resume": "free"}
"""Metadata of a field that a resumed run may change."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a full or failing disk."""


class ConfigError(ValueError):
    """A configuration that cannot be: says which key, what was found, what was expected."""


# ---------------------------------------------------------------------------------------------
# dict <-> dataclass
# ---------------------------------------------------------------------------------------------


def _exactly(kind: type):
    """A hook that takes a value of this type and nothing that merely converts to it."""

    def structure(value: Any, _: Any) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if kind is Path and type(value) is str:
            return Path(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise TypeError(f"expected {kind.__name__}, got {value!r}")
        return value

    return structure


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (bool, int, float, str, Path):
        converter.register_structure_hook(kind, _exactly(kind))
    converter.register_unstructure_hook(Path, str)
    converter.register_structure_hook_factory(
        dataclasses.is_dataclass,
        lambda cls: make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True),
    )
    return converter


_CONVERTER = _converter()


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts, lists, strings and numbers (what JSON and YAML hold)."""
    return _plain(_CONVERTER.unstructure(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value


def resume_fingerprint(config: Any) -> dict[str, Any]:
    """The configuration as a plain dict, without the fields that a resumed run may change (`RESUME_FREE`)."""
    classes = [cls for cls in type(config).__mro__ if dataclasses.is_dataclass(cls)]
    free = {f.name for cls in classes for f in dataclasses.fields(cls) if f.metadata.get("resume") == "free"}
    plain = to_dict(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            plain[field.name] = resume_fingerprint(value)
    return {name: value for name, value in plain.items() if name not in free}


def from_dict(cls: type[T], data: dict[str, Any], source: str = "configuration") -> T:
    """A dataclass from plain data; fields left out, at any depth, keep the defaults of `cls`.

    Raises:
        ConfigError: unknown key (with the nearest name), wrong type, or a value the class refuses.
    """
    _check_keys(cls, data, source)
    try:
        return _CONVERTER.structure(merge(_defaults(cls), data), cls)
    except Exception as error:
        raise ConfigError(f"{source}: {'; '.join(_reasons(error))}") from None


def _defaults(cls: type) -> dict[str, Any]:
    """Plain defaults: a section that names one value keeps the others of *this* class's section."""
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    return {name: to_dict(value) for name, value in fields.items() if value is not dataclasses.MISSING}


def _reasons(error: BaseException, path: str = "") -> list[str]:
    """One line per leaf of cattrs' tree of errors, with the dotted place."""
    if isinstance(error, cattrs.errors.BaseValidationError):
        lines = []
        for inner in error.exceptions:
            notes = [n for n in getattr(inner, "__notes__", []) if hasattr(n, "name") or hasattr(n, "index")]
            step = str(getattr(notes[0], "name", getattr(notes[0], "index", ""))) if notes else ""
            lines += _reasons(inner, f"{path}.{step}" if path and step else path or step)
        return lines
    said = "missing" if isinstance(error, KeyError) else str(error)
    return [f"{path}: {said}" if path else said]


def _check_keys(cls: type, data: Any, source: str, path: str = "") -> None:
    """Unknown keys, at any depth, before anything else is said."""
    if not isinstance(data, dict):
        raise ConfigError(
            f"{source}: {path or 'the whole file'} must be a mapping of names to values, got {data!r}"
        )
    fields = typing.get_type_hints(cls)
    for key, value in data.items():
        place = f"{path}.{key}" if path else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{source}: no key {place!r}{hint} (known here: {', '.join(fields)})")
        if (inner := _dataclass_in(fields[key])) and value is not None:
            _check_keys(inner, value, source, place)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of a field, also of `X | None`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


# ---------------------------------------------------------------------------------------------
# YAML
# ---------------------------------------------------------------------------------------------


def read_yaml(path: Path | str) -> dict[str, Any]:
    """A YAML 1.2 file as plain data (1e-4 is a number, `no` a word); see `find_config`."""
    path = find_config(path)
    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}; {_shipped_hint(path)}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); give a YAML file") from None
    except (
        YAMLError,
        ValueError,
        KeyError,
        RecursionError,
    ) as error:  # the others of !!bool foo and the like
        raise ConfigError(f"{path} is not YAML: {error}") from None
    return {} if data is None else data


def find_config(path: Path | str) -> Path:
    """The file, or the shipped one if it does not exist: configs/dvae/small.yaml works in any directory."""
    path = Path(path)
    if path.parts[:1] != ("configs",) or path.exists():
        return path
    shipped = CONFIGS.joinpath(*path.parts[1:])
    return shipped if shipped.is_file() and ".." not in path.parts else path


def _shipped_hint(path: Path) -> str:
    names = [f"configs/{file.relative_to(CONFIGS).as_posix()}" for file in sorted(CONFIGS.glob("*/*.yaml"))]
    near = difflib.get_close_matches(path.as_posix(), names, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"shipped are {', '.join(names)}"


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """`update` over `base`, mappings merged at every depth, everything else replaced."""
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def load(cls: type[T], files: Sequence[Path | str], schema: type | None = None) -> T:
    """A dataclass from files merged in order.

    Args:
        cls: what to build.
        files: YAML files.
        schema: the dataclass whose files these are, where a script reads another stage's file: the
            file is checked against it, and the sections that `cls` lacks are left out.
    """
    data: dict[str, Any] = {}
    for file in files:
        read = read_yaml(file)
        from_dict(schema or cls, read, str(file))
        data = merge(data, read)
    if schema:
        known = typing.get_type_hints(cls)
        data = {key: value for key, value in data.items() if key in known}
    return from_dict(cls, data, ", ".join(map(str, files)) or "configuration")


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    preset: Path | str | None = None,
    schema: type | None = None,
    description: str | None = None,
) -> T:
    """A run from the command line: `--config FILE` (repeatable), then dotted words that win.

    Args:
        cls: the run's dataclass.
        argv: words; None takes the process's own.
        preset: the file used when no argument at all is given; the run says so.
        schema: see `load`.
        description: shown by `--help` above the fields.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    subcommand = sys.argv[1 : len(sys.argv) - len(words)] if sys.argv[1:][-len(words) :] == words else []
    if preset and not words:
        print(f"no arguments: using --config {preset} (see --help for all settings)")
        words = ["--config", str(preset)]
    try:
        files, rest = split_config(words)
        default = load(cls, files, schema)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    text = f"{description or cls.__doc__}\n\n--config FILE (repeatable) reads YAML; dotted overrides win."
    # tyro joins lines that start with a letter
    text = re.sub(r"^(?=python |torchrun )", "  ", text, flags=re.MULTILINE)
    with _field_docs() if {"-h", "--help"} & {*rest} else nullcontext():
        prog = " ".join([sys.argv[0], *subcommand])
        return tyro.cli(cls, prog=prog, args=rest, default=default, description=text)


def overview(words: Sequence[str], description: str, more: str) -> None:
    """Prints this help and exits if the command line asks for help before it names what to do."""
    if words and all(word in ("-h", "--help") for word in words):
        print(f"{description.strip()}\n\n{more}")
        raise SystemExit(0)


@contextmanager
def cli_errors() -> Iterator[None]:
    """Prints a user's mistake or a full disk as one line with exit status 1; a bug keeps its traceback."""
    try:
        yield
        sys.stdout.flush()
    except (ValueError, FloatingPointError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    except BrokenPipeError:  # the reader of the output, such as `| head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it again at exit
        raise SystemExit("stopped: the output was closed by its reader") from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command resumes a training from its last checkpoint") from None


def split_config(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of every `--config FILE` or `--config=FILE`, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        known, rest = parser.parse_known_args(words)
    except argparse.ArgumentError:
        raise ConfigError("--config needs a file, for example --config configs/dvae/shapes.yaml") from None
    return known.config, rest


def _field_docs() -> ConstructorRegistry:
    """Tyro rule for the text under each field as its help; tyro alone keeps the line breaks."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def read(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or not isinstance(info.default, info.type):
            return None
        hints = typing.get_type_hints(info.type, include_extras=True)
        docs = _docs_of_fields(info.type)
        fields = tuple(
            StructFieldSpec(
                name=name, type=hints[name], default=getattr(info.default, name), helptext=docs.get(name)
            )
            for name in (field.name for field in dataclasses.fields(info.type))
        )
        return StructConstructorSpec(instantiate=info.type, fields=fields)

    return registry


def _docs_of_fields(cls: type) -> dict[str, str]:
    """Text under each field, inherited ones included, on one line."""
    found: dict[str, str] = {}
    for owner in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(text.value.value.split())
    return found

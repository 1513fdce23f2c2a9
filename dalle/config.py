"""Configuration: frozen dataclass <-> dict <-> YAML 1.2 <-> command line, strict in each direction.

A run is described by one dataclass whose defaults are the paper's. YAML files hold only what differs;
several merge in order, and dotted overrides on the command line win wherever they stand:

    python scripts/train_dvae.py --config configs/dvae/small.yaml --train.batch-size 64

A key that does not exist is an error that names the nearest one; so is a value of the wrong type.
"""

import argparse
import dataclasses
import difflib
import errno
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from numbers import Integral, Real
from operator import index
from pathlib import Path
from typing import Any, TypeVar

import tyro
from ruamel.yaml import YAML
from ruamel.yaml.events import AliasEvent

from dalle.help import describe, field_docs

T = TypeVar("T")
PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
"""Shipped configurations: configs/ of a checkout, or the copy inside an installed wheel."""
NUMBERS = {int: (Integral, 2**63 - 1, "a whole number"), float: (Real, sys.float_info.max, "a finite number")}
"""Python type of a number -> what is taken for it, its largest magnitude, its name in messages."""
LAYERS = ("depth", "blocks_per_group", "vision_layers", "text_layers", "blocks", "levels")
"""Fields that count layers, of which none is without a tensor."""
BATCHES = ("batch", "batch_size", "decode_batch_size", "overfit_batch", "prompts_per_batch")
LIMITS = dict.fromkeys((*LAYERS, "prefetch", "workers"), 2**10) | dict.fromkeys(BATCHES, 2**20)
type_hints = cache(typing.get_type_hints)
RESUME_FREE = {"resume": "free"}
"""Metadata of a field that a resumed run may change."""
MAX_YAML = 2**16
"""Characters of a configuration file: YAML is read at some 40,000 a second."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
"""Errors of a disk that is full, fails or refuses access."""


class ConfigError(ValueError):
    """A configuration that cannot be: says which key, what was found, what was expected."""


@typing.dataclass_transform(frozen_default=True)
def configuration(cls: type | None = None, *, kw_only: bool = False) -> Any:
    """A frozen dataclass whose values, however it is built, have the types of its fields; floats are finite.

    A list for a tuple, a string for a Path and a whole number of another type are converted.
    """
    if cls is None:
        return partial(configuration, kw_only=kw_only)
    check = getattr(cls, "__post_init__", lambda self: None)

    def __post_init__(self):
        for name, hint in type_hints(type(self)).items():
            given, default, wrong = getattr(self, name), getattr(type(self), name, None), []
            value = _read_value(hint, given, default, name, wrong)
            if wrong and type(whole := whole_number(given)) is int:
                wrong.clear()
                value = _read_value(hint, whole, default, name, wrong)
            if wrong:
                raise ValueError(wrong[0].replace(": expected", " must be", 1))
            if type(value) is int and value > LIMITS.get(name, value):
                raise ValueError(f"{name} must be at most {LIMITS[name]}, got {value}")
            object.__setattr__(self, name, value)
        check(self)

    cls.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)


def whole_number(value: Any) -> Any:
    """A whole number of any type (3.0, NumPy's, a tensor of one) as an int; anything else as it is."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return value
    try:
        whole = hasattr(value, "is_integer") and value.is_integer()
        return int(value) if whole else index(value)
    except TypeError:
        return value


def to_dict(config: Any) -> Any:
    """A dataclass as plain dicts, lists, strings and numbers (what JSON and YAML hold)."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def check_positive(config: Any, *names: str) -> None:
    """ValueError for the first of these fields that is neither above 0 nor None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def from_dict(cls: type[T], data: dict[str, Any], source: str = "configuration") -> T:
    """A dataclass from plain data; fields left out, at any depth, keep the defaults of `cls`.

    ConfigError for an unknown key (with the nearest name), a wrong type, or a value the class refuses.
    """
    wrong: list[str] = []
    try:
        config = _read_fields(cls, data, None, "", wrong)
    except (ValueError, OverflowError, RecursionError) as error:
        wrong = [str(error)]
    if wrong:
        raise ConfigError(f"{source}: {'; '.join(wrong):.800}")
    return config


def _read_fields(cls: type, data: Any, default: Any, path: str, wrong: list[str]) -> Any:
    """A dataclass; `default` has the values of fields left out, `wrong` collects errors by dotted path."""
    if not isinstance(data, dict):
        place = f"{path}: " if path else ""
        raise ConfigError(f"{place}must be a mapping of names to values, got {data!r:.200}")
    hints, prefix, values, before = typing.get_type_hints(cls), f"{path}." if path else "", {}, len(wrong)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"no key '{prefix}{key!s:.200}'{hint} (known here: {', '.join(hints)})")
    for field in dataclasses.fields(cls):
        name = field.name
        value = field.default if default is None else getattr(default, name)
        if name in data:
            section = value if dataclasses.is_dataclass(value) else None
            values[name] = _read_value(hints[name], data[name], section, prefix + name, wrong)
        elif value is dataclasses.MISSING:
            wrong.append(f"{prefix}{name}: missing")
        else:
            values[name] = value
    if len(wrong) == before:
        try:
            return cls(**values)
        except Exception as error:
            wrong.append(f"{path}: {error}" if path else str(error))
    return None


def _read_value(hint: Any, value: Any, default: Any, path: str, wrong: list[str]) -> Any:
    """A value of exactly this type, not one that merely converts to it; an int is a float."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _read_fields(hint, value, default, path, wrong)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # X | None
        return None if value is None else _read_value(options[0], value, None, path, wrong)
    if origin is tuple and isinstance(value, tuple | list):
        hints = options[:1] * len(value) if options[-1] is ... else options
        if len(hints) == len(value):
            pairs = enumerate(zip(hints, value, strict=True))
            return tuple(_read_value(of, item, None, f"{path}.{i}", wrong) for i, (of, item) in pairs)
    names = getattr(hint, "__name__", hint)
    if hint in NUMBERS:
        kind, limit, names = NUMBERS[hint]
        if isinstance(value, kind) and not isinstance(value, bool):
            plain = value.item() if hasattr(value, "item") else value
            if abs(plain) <= limit:
                return hint(plain)
            names += " below 2^63" if hint is int else ""
    elif type(value) is hint or (origin is typing.Literal and isinstance(value, str) and value in options):
        return value
    elif hint is Path and isinstance(value, str | Path):
        return hint(value)
    if origin is typing.Literal:
        names = f"one of {', '.join(options)}"
    wrong.append(f"{path}: expected {hint if origin is tuple else names}, got {value!r:.200}")
    return None


def read_yaml(path: Path | str) -> dict[str, Any]:
    """A YAML 1.2 file, or else the shipped one of this name, as plain data: 1e-4 is a number, `no` a word."""
    path, yaml = Path(path), YAML(typ="safe", pure=True)
    shipped = CONFIGS.joinpath(*path.parts[1:])
    if path.parts[:1] == ("configs",) and ".." not in path.parts and not path.exists() and shipped.is_file():
        path = shipped
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_YAML + 1)
        if len(text) > MAX_YAML or len(re.findall(r"[\[{]", text)) > 500:
            raise ValueError(f"it has more than {MAX_YAML} characters or 500 brackets")
        if any(isinstance(event, AliasEvent) for event in yaml.parse(text)):
            raise ValueError("aliases, such as *name, are not supported; write the value again")
        data = yaml.load(text)
    except FileNotFoundError:
        names = [f"configs/{f.relative_to(CONFIGS).as_posix()}" for f in sorted(CONFIGS.glob("*/*.yaml"))]
        near = difflib.get_close_matches(path.as_posix(), names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(names)}"
        raise ConfigError(f"no configuration file {path}; {hint}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); give a YAML file") from None
    except Exception as error:  # also KeyError of !!bool foo, IndexError of !!int ""
        raise ConfigError(f"{path} is not YAML that can be read: {error!s:.500}") from None
    return {} if data is None else data


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """`update` over `base`, mappings merged at every depth, everything else replaced."""
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def load(cls: type[T], files: Sequence[Path | str], schema: type | None = None) -> T:
    """A dataclass from YAML files merged in order.

    `schema` is the dataclass of a file of another stage: the file is checked against it, and the sections
    that `cls` lacks are left out.
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


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    preset: Path | str | None = None,
    schema: type | None = None,
    description: str | None = None,
) -> T:
    """A run from the command line: `--config FILE` (repeatable), then dotted words that win.

    `argv` are by default the process's own, `preset` is the configuration used, and named, where there are
    none. For `schema` see `load`; `description` is shown by `--help` above the fields.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    typed = sys.argv[: len(sys.argv) - len(words)] if sys.argv[1:][-len(words) :] == words else sys.argv[:1]
    if preset and not words:
        print(f"no arguments: using --config {preset} (see --help for all settings)")
        words = ["--config", str(preset)]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        known, rest = parser.parse_known_args(words)
        default = load(cls, known.config, schema) if known.config else cls()
    except argparse.ArgumentError:
        raise SystemExit("error: --config needs a file, such as configs/dvae/shapes.yaml") from None
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    if values := [word for word in rest if re.match(r"-[^\W\d]\w|-[^=]* ", word)]:
        hint = "a value that starts with - follows =, as in --prompt='-a red circle'"
        raise SystemExit(f"error: {values[0]!r:.100} is no option; {hint}")
    text = f"{description or cls.__doc__}\n\n--config FILE (repeatable) reads YAML; dotted overrides win."
    text = re.sub(r"^(?=python |torchrun )", "  ", text, flags=re.MULTILINE)  # tyro joins lines of letters
    with field_docs() if {"-h", "--help"} & {*rest} else nullcontext():
        return tyro.cli(cls, prog=" ".join(typed), args=rest, default=default, description=text)


@contextmanager
def cli_errors(parallel: bool = False) -> Iterator[None]:
    """One line and exit status 1 for a user's mistake, a bad path, a full disk; a bug keeps its traceback.

    `parallel` commands alone run under torchrun: in others each process would do all of the work.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no character that the console lacks may end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        if not parallel and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("this command runs in one process; start it without torchrun")
        yield
        print(end="", flush=True)  # also without a stdout
    except (ValueError, FloatingPointError, ImportError) as error:
        raise SystemExit(f"error: {describe(error)}") from None
    except BrokenPipeError:  # the reader of the output, such as `| head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it again at exit
        raise SystemExit("stopped: the output was closed by its reader") from None
    except (OSError, RuntimeError, MemoryError) as error:
        on_disk = isinstance(error, OSError) and (error.errno in DISK_ERRORS or error.filename is not None)
        if not on_disk and "allocate" not in str(error):  # of memory, by torch or NumPy
            raise
        raise SystemExit(f"error: {describe(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command resumes a training from its last checkpoint") from None

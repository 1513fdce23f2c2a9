"""A file of weights of any program: which container it is, and what lies in it, without running any of it.

    safetensors    a header of JSON, then bytes
    torch zip      torch.save since 1.6: data.pkl, and a member for each storage, none of them compressed
    TorchScript    torch.jit.save: the same, with code beside it that is left alone
    torch legacy   torch.save before 1.6: five pickles, then the storages
    pickle         pickle.dump: one pickle, each storage a torch legacy file inside it

`torch.load(weights_only=True)` reads the first form of zip alone, tells no shapes without the values, and refuses
the whole-module files that OpenAI published; here all go one way, and tests hold them equal where it can read.
"""

import io
import mmap
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dalle.pretrained.pickle_names import DTYPES, Held, Name, SavedTensor, Storage, is_held
from dalle.pretrained.safe_pickle import Forbidden, read_pickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
LEGACY_PROTOCOL = 1001
_ZIP = (zipfile.BadZipFile, struct.error)  # what zipfile raises for damage, beside the usual
WRONG_KINDS = {
    b"\x1f\x8b": "a gzip archive; unpack it and give the file inside",
    b"BZh": "a bzip2 archive; unpack it and give the file inside",
    b"\xfd7zXZ": "an xz archive; unpack it and give the file inside",
    b"\x89HDF": "a file of HDF5, which no checkpoint known here is",
    b"version https://git-lfs": "a pointer of Git LFS, not the file; fetch the file itself",
    b"<": "a page of HTML or XML, perhaps of a download that failed",
}


@dataclass
class SavedFile:
    """What lies in a file; `tree` is plain data with `SavedTensor` and `Held` among it."""

    path: Path
    container: str
    tree: Any


def read_torch_file(path: Path | str) -> SavedFile:
    """Reads all of a file but the numbers of its tensors.

    Raises:
        Forbidden: a pickle that names something that is not data; nothing of it was run.
        ValueError: no file, empty, truncated, compressed, or no file of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    with _blame(path):
        with path.open("rb") as file:
            head = file.read(512)
        for start, kind in WRONG_KINDS.items():
            if head.startswith(start):
                raise ValueError(f"it is {kind}")
        if head[257:262] == b"ustar":
            raise ValueError(
                "it is a tar; unpack it and give the file inside (torch before 0.1.10 wrote tars too)"
            )
        if head.startswith(b"PK\x03\x04"):
            return _open_zip(path)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            return SavedFile(path, "safetensors", _safetensors(path))
        return _open_pickle(path, head)


@contextmanager
def _blame(path: Path) -> Iterator[None]:
    """What goes wrong in reading, as a sentence about the file."""
    try:
        yield
    except Forbidden as error:
        raise Forbidden(f"{path} is refused: {error}; nothing of it was run") from None
    except (
        ValueError,
        RuntimeError,
        LookupError,
        OSError,
        EOFError,
        OverflowError,
        MemoryError,
        *_ZIP,
    ) as error:
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from None


# ---------------------------------------------------------------------------------------------
# safetensors
# ---------------------------------------------------------------------------------------------


def _safetensors(path: Path) -> dict[str, SavedTensor]:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            kinds = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"truncated or not a safetensors file: {error}") from None
    formats = {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
    }
    formats |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
    if strange := sorted({dtype for dtype, _ in kinds.values()} - formats.keys()):
        raise ValueError(f"number format {strange[0]}, which no checkpoint known here has")

    def read(name: str) -> Tensor:
        with _blame(path), safe_open(path, "pt") as file:
            return file.get_tensor(name)

    return {
        name: SavedTensor(getattr(torch, formats[dtype]), shape, partial(read, name))
        for name, (dtype, shape) in kinds.items()
    }


# ---------------------------------------------------------------------------------------------
# torch zip and TorchScript
# ---------------------------------------------------------------------------------------------


def _open_zip(path: Path) -> SavedFile:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"a truncated or damaged zip: {error}") from None
    members = {member.filename: member for member in archive.infolist()}
    roots = [
        name.removesuffix("data.pkl")
        for name in members
        if name.endswith("/data.pkl") and name.count("/") == 1
    ]
    if len(roots) != 1:
        raise ValueError("a zip that torch.save did not write: it has no data.pkl, or more than one")
    root, script = roots[0], any(name.startswith(f"{roots[0]}code/") for name in members)
    if len(members) != len(archive.infolist()):
        raise ValueError("a zip with two members of one name")
    _check_sizes(path, root, members)
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("written on a big-endian machine; load it there and save it as safetensors")

    def fetch(key: str, size: int) -> bytearray:
        if members[f"{root}data/{key}"].file_size != size:
            raise ValueError(
                f"storage {key} has {members[f'{root}data/{key}'].file_size} bytes, expected {size}"
            )
        buffer = bytearray(size)
        with archive.open(f"{root}data/{key}") as file:
            file.readinto(buffer)
            file.read(1)  # the end: now the sum of its bits is checked
        return buffer

    def held(name: str) -> bool:
        return is_held(name) or (script and name.startswith("__torch__."))

    data = io.BytesIO(archive.read(f"{root}data.pkl"))
    tree = read_pickle(data, _Storages(path, fetch), held=held)
    return SavedFile(path, "TorchScript" if script else "torch zip", tree)


def _check_sizes(path: Path, root: str, members: dict[str, zipfile.ZipInfo]) -> None:
    """ValueError for what is read if it takes more room than the file: a zip bomb, or another program's zip."""
    used = [m for name, m in members.items() if name in (f"{root}data.pkl", f"{root}byteorder")]
    used += [member for name, member in members.items() if name.startswith(f"{root}data/")]
    for member in used:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(
                f"its member {member.filename:.80} is compressed, to {member.compress_size} of {member.file_size} "
                "bytes; torch compresses none, so this is a zip bomb or was packed again"
            )
    if (size := sum(member.file_size for member in used)) > path.stat().st_size:
        raise ValueError(f"its members claim {size} bytes, the file has {path.stat().st_size}: a zip bomb")


class _Storages:
    """What the persistent ids of a torch file stand for; each storage is read once, when it is asked for."""

    def __init__(self, path: Path, fetch: Callable[[str, int], bytearray]):
        self.path, self.fetch = path, fetch
        self.formats: dict[str, torch.dtype] = {}
        self._kept: dict[str, Tensor] = {}

    def __call__(self, identity: Any) -> Any:
        if type(identity) is not tuple or not identity or identity[0] not in ("storage", "module"):
            raise ValueError(f"a reference to {shown(identity):.80}")
        if identity[0] == "module":  # legacy files keep the source of a class beside it
            return identity[1]
        kind, key, count = identity[1], identity[2], identity[4]
        if (
            not isinstance(kind, Name)
            or kind.full not in DTYPES
            or type(key) not in (str, int)
            or type(count) is not int
            or count < 0
        ):
            raise ValueError("a storage of unknown kind or size")
        if len(identity) > 5 and identity[5] is not None:
            raise ValueError("a view of a storage, as torch wrote before 0.4")
        key, dtype = str(key), DTYPES[kind.full]
        if self.formats.setdefault(key, dtype) != dtype:
            raise ValueError(f"storage {key} as {dtype} and as {self.formats[key]}")
        return Storage(dtype, partial(self.read, key, count), count)

    def read(self, key: str, count: int) -> Tensor:
        """The numbers of a storage, flat."""
        if key not in self._kept:
            dtype = self.formats[key]
            with _blame(self.path):
                buffer = self.fetch(key, count * dtype.itemsize)
                self._kept[key] = (
                    torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
                )
        return self._kept[key]


# ---------------------------------------------------------------------------------------------
# torch legacy and bare pickles
# ---------------------------------------------------------------------------------------------


def _open_pickle(path: Path, head: bytes) -> SavedFile:
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def storage(inner: bytes) -> Any:
        """torch.storage._load_from_bytes: a storage in a bare pickle is a legacy file of its own."""
        return _legacy(path, io.BytesIO(inner), inner, None)[1]

    try:
        legacy, tree = _legacy(path, data, data, {"torch.storage._load_from_bytes": storage})
    except Forbidden:
        raise
    except ValueError:
        if all(byte >= 32 or byte in b"\t\r\n" for byte in head[:64]) and not head.startswith(b"("):
            raise ValueError("it is a text file, not one of weights") from None
        raise
    return SavedFile(path, "torch legacy" if legacy else "pickle", tree)


def _legacy(path: Path, stream: Any, data: Any, makers: dict[str, Callable] | None) -> tuple[bool, Any]:
    """(whether it is one, its value): the pickles of a legacy file, or the one of a bare pickle."""
    places: dict[str, tuple[int, int]] = {}  # (first byte, bytes) of each storage

    def fetch(key: str, size: int) -> bytearray:
        start, have = places[key]
        if have != size:
            raise ValueError(f"storage {key} has {have} bytes, expected {size}")
        return bytearray(data[start : start + size])

    storages = _Storages(path, fetch)
    first = read_pickle(stream, storages, makers)
    if first != LEGACY_MAGIC:
        return False, first
    protocol, system = read_pickle(stream), read_pickle(stream)
    if protocol != LEGACY_PROTOCOL or type(system) is not dict or not system.get("little_endian"):
        raise ValueError("a torch file of unknown protocol, or of a big-endian machine")
    tree, keys = read_pickle(stream, storages), read_pickle(stream)
    if (
        type(keys) is not list
        or {*map(type, keys)} - {str, int}
        or sorted(map(str, keys)) != sorted(storages.formats)
    ):
        raise ValueError("its storages are not those that its tensors name")
    place = stream.tell()
    for key in map(str, keys):
        size = int.from_bytes(data[place : place + 8], sys.byteorder) * storages.formats[key].itemsize
        places[key] = (place + 8, size)
        place += 8 + size
    if place > len(data):
        raise ValueError(f"truncated: it has {len(data)} bytes of {place}")
    return True, tree


# ---------------------------------------------------------------------------------------------
# The weights among the rest
# ---------------------------------------------------------------------------------------------

WHERE = ("state_dict", "weights", "ema", "model", "module")
"""Under which key programs keep the weights, in the order in which they are looked for."""
MAX_MODULES, MAX_DEPTH = 20_000, 50


def weights_of(tree: Any, depth: int = 3) -> dict[str, SavedTensor]:
    """Tensors by name: of a state dict, of one under a key of WHERE, or of a whole module."""
    if isinstance(tree, Held):
        return _module_tensors(tree)
    if not isinstance(tree, dict):
        return {}
    for key in WHERE:
        if depth and isinstance(tree.get(key), dict | Held) and (inner := weights_of(tree[key], depth - 1)):
            return inner
    return {
        key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, SavedTensor)
    }


def _module_tensors(root: Held) -> dict[str, SavedTensor]:
    """The tensors of a module and of those inside it; a TorchScript module has them among its attributes."""
    found: dict[str, SavedTensor] = {}
    queue, visits = [("", root)], 0
    while queue:
        prefix, module = queue.pop()
        visits += 1
        if visits > MAX_MODULES or prefix.count(".") > MAX_DEPTH:
            raise ValueError("a module that holds itself, or too many of them")
        for name, value in attributes(module).items():
            if isinstance(value, SavedTensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, Held):
                queue.append((f"{prefix}{name}.", value))
    return found


def attributes(module: Held) -> dict[str, Any]:
    """Tensors and inner modules of a module by name."""
    state = module.state if isinstance(module.state, dict) else {}
    if "_modules" not in state:
        return state
    parts = [state.get(key) for key in ("_parameters", "_buffers", "_modules")]
    return {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}

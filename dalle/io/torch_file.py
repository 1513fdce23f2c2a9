"""Files of weights of any program, read without running code.

    safetensors    a header of JSON, then bytes
    torch zip      torch.save since 1.6: data.pkl, and an uncompressed member for each storage
    TorchScript    torch.jit.save: the same, with code that is ignored
    torch legacy   torch.save before 1.6: five pickles, then the storages

Pickles are scanned (dalle/io/pickle_scan.py), then read by `torch.load(weights_only=True)`. Instances
of the classes in STAND_INS, such as OpenAI's whole modules, become a `StandIn` with their attributes. Tensors
of a torch zip are mapped from the file.
"""

import io
import mmap
import re
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from dalle.io.files import check_kind, without_wrappers
from dalle.io.pickle_scan import Forbidden, PickleScan

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER


class StandIn:
    """An instance of a class that is not imported."""

    state: Any = None  # its attributes

    def __new__(cls, *arguments: Any):
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class DictStandIn:
    """An instance of a dict's subclass, read as the OrderedDict that torch allows entries in."""

    def __new__(cls, *arguments: Any):
        return OrderedDict()


@dataclass
class SavedFile:
    """Content of a file; `tree` is plain data with tensors and `StandIn` in it."""

    path: Path
    container: str
    tree: Any


def read_torch_file(path: Path | str) -> SavedFile:
    """Reads a file of weights.

    Raises:
        Forbidden: a pickle that names a global that is not data.
        ValueError: no file, empty, truncated, compressed, or no file of weights.
    """
    path = Path(path)
    try:
        head = check_kind(path)
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    except OSError as error:  # a folder, or no right to read it
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        if head.startswith(b"PK\x03\x04"):
            return _read_zip(path)
        header = int.from_bytes(head[:8], "little") < 2**32  # text begins with larger numbers
        if (header and head[8:9] == b"{") or (path.suffix == ".safetensors" and len(head) < 9):
            return SavedFile(path, "safetensors", load_file(path))
        return _read_legacy(path)
    except Forbidden as error:
        raise Forbidden(f"{path} is refused: {error}; nothing of it was run") from None
    except Exception as error:  # a damaged file raises nearly anything
        kind = type(error).__name__
        reason = re.sub(r"(?s).*WeightsUnpickler error:\s*|\. Please use.*|\n.*", "", str(error)) or kind
        if isinstance(error, zipfile.BadZipFile | SafetensorError):
            reason = f"truncated or damaged: {reason}"
        if all(byte >= 32 or byte in b"\t\r\n" for byte in head[:64]):
            reason = "it is a text file, or a pickle that torch.save did not write"
        raise ValueError(f"{path} cannot be read: {reason:.300}") from None


def _load(source: Path | io.BytesIO, scan: PickleScan, mapped: bool = False) -> Any:
    """The value of a scanned file, by torch."""
    if scan.protocol > 2:
        raise ValueError(f"a pickle with protocol {scan.protocol}, not torch.save's default of 2")
    dicts = ("defaultdict", ".AttributeDict")
    classes = [(DictStandIn if name.endswith(dicts) else StandIn, name) for name in scan.stand_ins]
    with warnings.catch_warnings(), safe_globals(classes):
        warnings.simplefilter("ignore")  # of old pickles, about which a user can do nothing
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def _read_zip(path: Path) -> SavedFile:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch("[^/]+/data.pkl", name)]
        if len(roots) != 1:
            raise ValueError("a zip that torch.save did not write: it has no data.pkl, or more than one")
        if len({name.lower() for name in names}) != len(names):  # torch ignores their case
            raise ValueError("a zip with two members of one name")
        root = roots[0]
        members = _checked_members(path, archive, root)
        scan = PickleScan(io.BytesIO(archive.read(f"{root}data.pkl")))
        for key, nbytes in scan.storages:  # torch trusts the pickle
            if (size := members[f"{root}data/{key}"].file_size) != nbytes:
                raise ValueError(f"storage {key} has {size} bytes, expected {nbytes}")
        if any(name.startswith(f"{root}code/") for name in names):
            return SavedFile(path, "TorchScript", _load(_without_code(archive, members), scan))
        return SavedFile(path, "torch zip", _load(path, scan, mapped=True))


def _checked_members(path: Path, archive: zipfile.ZipFile, root: str) -> dict[str, zipfile.ZipInfo]:
    """The members that torch reads, their CRC checked; ValueError for a zip bomb."""
    names = ("data.pkl", "version", "byteorder", ".format_version", ".storage_alignment")
    files = {f"{root}{name}" for name in names}
    used = [m for m in archive.infolist() if m.filename in files or m.filename.startswith(f"{root}data/")]
    for member in used:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"its member {member.filename:.80} is compressed: a zip bomb, or repacked")
    if (size := sum(member.file_size for member in used)) > path.stat().st_size:
        raise ValueError(f"its members claim {size} bytes, the file has {path.stat().st_size}: a zip bomb")
    for member in used:
        with archive.open(member) as content:
            while content.read(2**20):  # zipfile compares the CRC at the end
                pass
    return {member.filename: member for member in used}


def _without_code(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> io.BytesIO:
    """The weights of a TorchScript archive as a torch zip, which torch reads without its code."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as weights:
        for name, member in members.items():
            weights.writestr(name, archive.read(member))
    buffer.seek(0)
    return buffer


def _read_legacy(path: Path) -> SavedFile:
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if PickleScan(data).value != LEGACY_MAGIC:
            raise ValueError("a pickle that torch.save did not write; save it by torch.save")
        _, _, tree, keys = (PickleScan(data) for _ in range(4))
        if large := [nbytes for _, nbytes in tree.storages if not 0 <= nbytes <= size]:
            raise ValueError(f"a storage of {large[0]} bytes in a file of {size}")
        if {*map(str, keys.literals)} != {key for key, _ in tree.storages}:
            raise ValueError("its storages are not those of its tensors")
        return SavedFile(path, "torch legacy", _load(_without_sources(data, tree) or path, tree))


def _without_sources(data: mmap.mmap, tree: PickleScan) -> io.BytesIO | None:
    """A legacy file without the sources of its classes, if there are any: torch would refuse them."""
    pieces, end = [], 0
    for start, after, name, name_end in tree.modules:
        pieces += [data[end:start], data[name:name_end]]
        end = after
    return io.BytesIO(b"".join([*pieces, data[end:]])) if pieces else None


WEIGHT_KEYS = ("state_dict", "weights", "ema", "model", "module")
"""Keys of the weights in files of other programs, in the order in which they are tried."""
MAX_MODULES, MAX_DEPTH = 20_000, 50


def weights_of(tree: Any, depth: int = 3) -> dict[str, Tensor]:
    """Tensors by name, without WRAPPERS, of a state dict, of one under a WEIGHT_KEYS, or of a module."""
    if not isinstance(tree, dict | StandIn):
        return {}
    if isinstance(tree, StandIn):
        tree, depth = _module_tensors(tree), 0
    for key in WEIGHT_KEYS if depth else ():
        if isinstance(tree.get(key), dict | StandIn) and (inner := weights_of(tree[key], depth - 1)):
            return inner
    tensors = {k: t.detach() for k, t in tree.items() if isinstance(k, str) and isinstance(t, Tensor)}
    return without_wrappers(tensors)


def _module_tensors(root: StandIn) -> dict[str, Tensor]:
    """The tensors of a module and of those inside it."""
    found: dict[str, Tensor] = {}
    modules = [("", root)]
    for prefix, module in modules:  # which grows
        if len(modules) > MAX_MODULES or prefix.count(".") > MAX_DEPTH:
            raise ValueError("a module that holds itself, or too many of them")
        for name, value in attributes(module).items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value.detach()
            elif isinstance(value, StandIn):
                modules.append((f"{prefix}{name}.", value))
    return found


def attributes(module: Any) -> dict[str, Any]:
    """Tensors and inner modules of a module by name, all attributes of one of TorchScript, none of others."""
    state = module.state if isinstance(module, StandIn) and isinstance(module.state, dict) else {}
    if "_modules" not in state:
        return state
    parts = [state.get(key) for key in ("_parameters", "_buffers", "_modules")]
    return {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}

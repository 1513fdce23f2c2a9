"""File I/O: atomic writes, safetensors, JSON, checksums, and the format of checkpoints."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle.io.text import parse_json, read_text


def make_directory(folder: Path) -> Path:
    """Creates a directory; ValueError if it cannot be created or written to."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may try at the same time
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); give another path") from None
    return folder


RESULTS = {
    "spec.json": "a token cache",
    "config.json": "a model directory",
    "checkpoints": "a run",
    "meta.json": "a checkpoint",
}
"""What a folder is, by a file or folder in it."""


def check_result(folder: Path, own: str = "") -> Path:
    """The folder; ValueError if it is a result of another kind than the one whose mark is `own`."""
    for mark, name in RESULTS.items():
        if mark != own and (folder / mark).exists():
            raise ValueError(f"{folder} is {name}, it has a {mark}; give another --out")
    return folder


def prepare_file(path: Path) -> None:
    """Creates the directory of a file to be written; ValueError if the file cannot be, before the work."""
    try:
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".partial-{path.name}")
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); give the name of another file") from None


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def write_tensors(path: Path, tensors: dict[str, Tensor], copy: bool = True) -> None:
    """Writes a safetensors file and syncs it; `copy` is False for tensors that are `on_cpu` already.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    try:
        save_file(on_cpu(tensors) if copy else tensors, path)
    except SafetensorError as error:  # has the error number in its text only
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from None
    follow_umask(path)
    sync(path)


def follow_umask(path: Path) -> None:
    """Gives a file the permissions of a new one; safetensors and tempfile make files for the owner alone."""
    probe = path.with_name(f".partial-mode-{path.name}")
    probe.touch()
    path.chmod(probe.stat().st_mode)
    probe.unlink(missing_ok=True)


WRONG_KINDS = {
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself",
    b"<": "a page of HTML or XML, perhaps of a download that failed",
}


def check_kind(path: Path) -> bytes:
    """The first 512 bytes of a file of weights; ValueError if it is empty or of another kind."""
    with path.open("rb") as file:
        head = file.read(512)
    kinds = [kind for start, kind in WRONG_KINDS.items() if head.lstrip().startswith(start)]
    if head[257:262] == b"ustar":
        kinds = ["a tar; unpack it (torch before 0.1.10 wrote tars too)"]
    if kinds or not head:
        raise ValueError(f"{path} is {kinds[0] if kinds else 'empty'}")
    return head


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Maps a safetensors file; ValueError if it is missing or damaged, OSError if it cannot be read."""
    try:
        path.open("rb").close()  # safetensors calls every file missing that it cannot open
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"no file {path}; the checkpoint is incomplete") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory, expected a file of weights") from None
    except SafetensorError as error:
        check_kind(path)
        raise ValueError(f"{path} is truncated or not a safetensors file: {error!s:.300}") from None


WRAPPERS = re.compile(
    r"^((module|model|ema|ema_model|student|_\w+_module|_orig_mod)\.)+|\b(_\w+_module|_orig_mod)\."
)
"""What DDP, Lightning and averages put before the names of tensors, FSDP and torch.compile also inside."""


def without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with names without WRAPPERS; as they are if two would have one name."""
    counted = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}  # AveragedModel's
    renamed = {WRAPPERS.sub("", name): tensor for name, tensor in counted.items()}
    return renamed if len(renamed) == len(counted) else tensors


def load_strict(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Weights into a model, only compared on the meta device; ValueError names the first wrong tensor."""
    expected = model.state_dict()
    if expected.keys() != tensors.keys():
        tensors = without_wrappers(tensors)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{source} lacks {len(missing)} tensors of the model, first {missing[0]!r}")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{source} holds {len(extra)} tensors the model lacks, first {extra[0]!r}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model's is {tuple(expected[name].shape)}"
            raise ValueError(f"{source}: {name!r} is {shapes}")
    if not any(tensor.is_meta for tensor in expected.values()):
        model.load_state_dict(tensors)
    return tensors


def write_json(path: Path, data: Any) -> None:
    """Writes JSON, atomically."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError if the file is missing, damaged, or holds anything else."""
    try:
        data = parse_json(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no file {path}; expected a run or model directory of this library") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged: it holds {data!r:.80}, expected a JSON object")
    return data


def write_text(path: Path, text: str) -> None:
    """Writes a text file and syncs it, atomically; lone surrogates become the escapes that JSON reads."""
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Waits until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until a folder's list of names is on disk, on POSIX systems."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


CHECKSUMS = "SHA256SUMS"
"""Hashes of a folder's files, in the format of `sha256sum --check`."""


def file_hashes(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """sha256 of files, by their path in the folder."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def write_checksums(folder: Path, sums: dict[str, str] | None = None) -> None:
    """Writes a folder's SHA256SUMS, of the given hashes or of all its files."""
    if sums is None:
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS]
        sums = file_hashes(folder, files)
    write_text(folder / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def read_checksums(folder: Path) -> dict[str, str]:
    """sha256 by file name, of a folder's SHA256SUMS; ValueError if it cannot be read."""
    path = folder / CHECKSUMS
    lines = read_text(path, "a list of hashes").rstrip("\n").split("\n")
    if wrong := [line for line in lines if not re.fullmatch(r"[0-9a-f]{64}  .+", line)]:
        raise ValueError(f"{path} is no list of hashes: {wrong[0]!r:.80}")
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def verify_checksums(
    folder: Path, wanted: Callable[[str], bool] = lambda name: True, rank: int = 0, world: int = 1
) -> str | None:
    """An error for the first file that does not match its folder's SHA256SUMS, or None.

    `wanted` chooses files; of `world` processes the one of this `rank` reads its share.
    """
    try:
        sums = read_checksums(folder)
    except ValueError as error:
        return str(error)
    unknown = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")} - sums.keys()
    if unknown:
        return f"{folder / min(unknown)} is not in {CHECKSUMS}"
    for name in sorted(filter(wanted, sums))[rank::world]:
        path = folder / name
        try:
            if file_hashes(folder, [path])[name] != sums[name]:
                return f"{path} is truncated or changed: its sha256 is not that of {CHECKSUMS}"
        except (OSError, ValueError) as error:
            return f"{path} cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


FORMAT = 1
"""Of a checkpoint's meta.json and a model directory's config.json."""


def check_meta(meta: Any, kind: str, source: Path) -> dict[str, Any]:
    """The content of meta.json or config.json; ValueError for another kind or format, or a damaged file.

    `kind` is one of `MODEL_REGISTRY` (dalle/hub/registry.py), or "dalle" for a model directory.
    """
    found = meta.get("kind") if isinstance(meta, dict) else None
    if found != kind:
        raise ValueError(f"{source} holds {found or 'something unknown'!r:.80}, expected {kind!r}")
    number = meta.get("format")
    if type(number) is not int or number != FORMAT:
        raise ValueError(
            f"{source} has format {number!r:.80}, this version reads {FORMAT}; use the version that wrote it"
        )
    names = ("model_config", "config", "inputs", "parts", "ema", "init")
    if wrong := [name for name in names if not isinstance(meta.get(name, {}), dict)]:
        raise ValueError(f"{source}: {' and '.join(wrong)} must be JSON objects; it is damaged")
    if kind not in ("dalle", "tokens"):
        ema = meta.get("ema", {})
        decay = ema.get("decay")
        counts = [meta.get("step"), meta.get("steps", 0), ema.get("updates"), ema.get("update_every")]
        sound = all(type(count) is int and 0 <= count < 2**63 for count in counts)
        sound = sound and type(decay) in (int, float) and 0 <= decay <= 1
        if not sound or not {"config", "inputs"} <= meta.keys():
            raise ValueError(f"{source}: meta.json lacks config, inputs, step or ema; it is damaged")
    return meta


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory; ValueError if there is none, for another format or a damaged one."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is no model directory (no config.json); make one with save_pretrained")
    config = check_meta(read_json(path), "dalle", directory)
    inputs = config.get("inputs", {"": None})
    if not config.get("parts") or not all(isinstance(link, str) for link in inputs.values()):
        raise ValueError(f"{path} lacks inputs or parts; it is damaged")
    for kind, part in config["parts"].items():
        described = part if isinstance(part, dict) else {}
        model_config, digest = described.get("model_config"), described.get("hash")
        named = kind.isidentifier() and len(kind) < 80 and isinstance(digest, str) and len(digest) < 80
        if not named or not isinstance(model_config, dict):
            raise ValueError(f"{path}: part {kind!r:.80} needs a name, model_config and hash; it is damaged")
    return config

"""Files written whole or not at all, and read without running what is in them: safetensors, JSON, text."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def make_directory(folder: Path) -> Path:
    """The directory, made where there is none; ValueError where it cannot be, or cannot be written to."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may try at the same time
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); give another --out, or another path") from None
    return folder


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, on disk when this returns."""
    save_file({name: t.detach().contiguous().cpu().clone() for name, t in tensors.items()}, path)
    sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; ValueError for one that is missing, truncated or something else."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"no file {path}; the checkpoint is incomplete") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None


def write_json(path: Path, data: Any) -> None:
    """JSON, on disk when this returns; never half a file."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """JSON; ValueError for a file that is missing or something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no file {path}; expected a run or model directory of this library") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def write_text(path: Path, text: str) -> None:
    """A text file replaced in one instant."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


def sync(path: Path) -> None:
    """The file is on disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """The folder's list of names is on disk when this returns, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

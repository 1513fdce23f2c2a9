"""Indexes of tars and tables, built once, memory-mapped, and shared by processes.

An index is a folder with samples.bin (fixed-size records), text.bin (strings that they point into) and
meta.json. Its name is a hash of the names, sizes and times of the indexed files, so a change builds another
one. It is written under a temporary name and renamed when complete.
"""

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dalle.types import BadSample

FORMAT = 1
FOLDER = ".dalle-index"
TRIES = 5
"""Attempts to replace a damaged index while other processes may do the same."""


class StringTable:
    """Strings by index in one run of bytes: a million file names take tens of megabytes."""

    def __init__(self, texts: Iterable[str]):
        data, ends = bytearray(), array("Q", [0])
        for text in texts:
            data += text.encode("utf-8", "surrogatepass")
            ends.append(len(data))
        self._data, self._ends = bytes(data), np.array(ends, np.uint64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = int(self._ends[index]), int(self._ends[index + 1])
        return self._data[start:end].decode("utf-8", "surrogatepass")

    def digest(self) -> str:
        """16 hex characters of all strings."""
        return hashlib.blake2b(self._data + b"\n" + self._ends.tobytes(), digest_size=8).hexdigest()


def name_hash(name: str) -> int:
    """A number below 2^32 that depends on the name alone; it decides the split of a sample."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).digest())


class IndexWriter:
    """Appends to an index under construction."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self._samples, self._text = (folder / "samples.bin").open("wb"), (folder / "text.bin").open("wb")
        self.skipped: list[BadSample] = []
        self.keep = True  # False if a file could not be read this time but might be the next
        self._hash = hashlib.blake2b(digest_size=8)

    def add_text(self, data: bytes) -> tuple[int, int]:
        """Appends a string; returns its offset and length."""
        offset = self._text.tell()
        self._text.write(data)
        self._hash.update(data)
        return offset, len(data)

    def add(self, records: np.ndarray) -> None:
        """Appends records."""
        data = records.astype(self.dtype).tobytes()
        self._samples.write(data)
        self._hash.update(data)

    def close(self) -> None:
        """Writes meta.json."""
        meta = {
            "sizes": {"samples": self._samples.tell(), "text": self._text.tell()},
            "hash": self._hash.hexdigest(),
            "skipped": [asdict(bad) for bad in self.skipped],
        }
        self._samples.close()
        self._text.close()
        (self.folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


class Index:
    """A complete index: `samples` are records, `text(offset, length)` the strings that they point to."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for name, size in meta["sizes"].items():
            if (folder / f"{name}.bin").stat().st_size != size:
                raise ValueError(f"{folder / name}.bin is truncated")
        self.hash = meta["hash"]
        self.skipped = [BadSample(**bad) for bad in meta["skipped"]]
        self.samples, self._text = self._map("samples", dtype), self._map("text", np.dtype(np.uint8))

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        file = self.folder / f"{name}.bin"
        return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)

    def text(self, offset: int, length: int) -> bytes:
        """Bytes added by `IndexWriter.add_text`."""
        return self._text[int(offset) : int(offset) + int(length)].tobytes()

    def __reduce__(self):  # another process maps the files again
        return Index, (self.folder, self.dtype)


def open_or_build_index(
    files: Sequence[Path],
    kind: str,
    dtype: np.dtype,
    build: Callable[[IndexWriter, Sequence[Path]], None],
    index_dir: Path | None,
) -> Index:
    """The index of these files: the existing one, or a new one.

    Args:
        files: indexed files.
        kind: everything else that the index depends on, as text.
        dtype: of a record.
        build: fills the index.
        index_dir: folder of indexes. None tries a hidden folder beside the files, then ~/.cache/dalle, then a
            temporary folder.
    """
    digest = hashlib.blake2b(f"{FORMAT} {kind}".encode(), digest_size=12)
    for file in files:
        status = file.stat()
        text = f"\n{file.resolve()} {status.st_size} {status.st_mtime_ns}"
        digest.update(text.encode("utf-8", "surrogateescape"))
    key = digest.hexdigest()
    folders = [index_dir] if index_dir else [files[0].parent / FOLDER, Path.home() / ".cache" / "dalle", None]
    for folder in filter(None, folders):
        with suppress(OSError, ValueError, LookupError):
            return Index(folder / key, dtype)
    for folder in folders:
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".partial-{key[:6]}-", dir=folder))
        except OSError as error:
            problem = error
            continue
        return _build(partial, files, dtype, build, folder / key if folder else None)
    raise ValueError(f"cannot write an index to {index_dir} ({problem}); give another --data.index-dir")


def _build(
    partial: Path, files: Sequence[Path], dtype: np.dtype, build: Callable, final: Path | None
) -> Index:
    try:
        writer = IndexWriter(partial, dtype)
        build(writer, files)
        writer.close()
        index = Index(partial, dtype)  # its maps stay valid, whatever another process does to the folder
        return _rename(index, final) if writer.keep and final else index
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _rename(index: Index, final: Path) -> Index:
    """Renames a complete index, or opens the one that another process has made meanwhile."""
    for _ in range(TRIES):
        with suppress(OSError):
            os.replace(index.folder, final)
            index.folder = final
            break
        with suppress(OSError, ValueError, LookupError):
            found = Index(final, index.dtype)
            shutil.rmtree(index.folder)
            return found
        shutil.rmtree(final, ignore_errors=True)  # damaged
    return index


def progress(files: Sequence[Path], kind: str):
    """The files, with a progress bar."""
    return tqdm(files, desc=f"index of {kind}", unit="file", disable=None, leave=False)

"""Indexes of tars and tables, built once, memory-mapped, and shared by processes.

An index is one file: strings, fixed-size records that point into them, JSON metadata, the length of the
metadata, and the CRC-32 of these, compared when the index is opened (a second per GB). Its name is a hash of
the names, sizes and times of the indexed files. It is renamed when complete.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dalle.io.files import follow_umask
from dalle.io.text import parse_json
from dalle.types import BadSample

FORMAT = 4
FOLDER = ".dalle-index"
FOOTER = 8
"""Bytes of the length of the metadata, before the 4 of the CRC-32 at the end of the file."""
BLOCK = 2**20


def name_hash(name: str) -> int:
    """A number below 2^32 that depends on the name alone; it decides the split of a sample."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).digest())


def name_hashes(names: Iterable[str]) -> np.ndarray:
    """uint32 (N,), the hash of each name."""
    return np.fromiter(map(name_hash, names), np.uint32)


def file_status(file: Path) -> tuple[int, int]:
    """Size and time of a file, which change with its content; zeros if it is gone."""
    with suppress(OSError):
        status = file.stat()
        return status.st_size, status.st_mtime_ns
    return 0, 0


class IndexWriter:
    """Appends to an index under construction."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.skipped: list[BadSample] = []
        self.keep = True  # False if a file could not be read this time but might be the next
        self._samples = tempfile.TemporaryFile()  # noqa: SIM115
        self._crc = 0
        self._hash = blake2b(digest_size=8)

    def skip(self, name: str, cause: str, detail: str) -> None:
        """Adds a bad sample."""
        self.skipped.append(BadSample(None, name, cause, detail))

    def add_text(self, data: bytes) -> tuple[int, int]:
        """Appends a string; returns its offset and length."""
        offset = self.file.tell()
        self._write(data)
        self._hash.update(data)
        return offset, len(data)

    def add(self, records: np.ndarray) -> None:
        """Appends records."""
        self._samples.write(records.tobytes())
        self._hash.update(records.tobytes())

    def close(self) -> None:
        """Writes records and metadata behind the strings."""
        start = self.file.tell()
        with self._samples:
            self._samples.seek(0)
            while block := self._samples.read(BLOCK):
                self._write(block)
        skipped = [asdict(bad) for bad in self.skipped]
        meta = {"start": start, "end": self.file.tell(), "hash": self._hash.hexdigest(), "skipped": skipped}
        data = json.dumps(meta).encode()
        self._write(data + len(data).to_bytes(FOOTER))
        self.file.write(self._crc.to_bytes(4))
        self.file.close()

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self._crc = zlib.crc32(data, self._crc)


class Index:
    """A complete index: `samples` are records, `text(offset, length)` the strings that they point to.

    Raises:
        OSError, ValueError, LookupError, TypeError: no index, or a damaged one.
    """

    def __init__(self, path: Path, dtype: np.dtype, verify: bool = True):
        self.path, self.dtype = path, dtype
        self._data = np.memmap(path, np.uint8, "r")
        end = len(self._data) - FOOTER - 4
        if verify and zlib.crc32(self._data[:-4]) != int.from_bytes(self._data[-4:].tobytes()):
            raise ValueError(f"{path} is damaged")
        meta_start = end - int.from_bytes(self._data[end:-4].tobytes())
        meta = parse_json(self._data[meta_start:end].tobytes(), str(path))
        self.hash, self.skipped = meta["hash"], [BadSample(**bad) for bad in meta["skipped"]]
        self.samples = self._data[meta["start"] : meta["end"]].view(dtype)

    def text(self, offset: int, length: int) -> bytes:
        """Bytes added by `IndexWriter.add_text`."""
        return self._data[int(offset) : int(offset) + int(length)].tobytes()

    def __reduce__(self):  # another process maps the file again
        return Index, (self.path, self.dtype, False)


def open_or_build_index(
    files: Sequence[Path],
    kind: str,
    dtype: np.dtype,
    build: Callable[[IndexWriter, Sequence[Path]], None],
    index_dir: Path | None,
) -> Index:
    """The index of these files: the existing one, or a new one filled by `build`.

    `kind` is everything else that it depends on, `dtype` that of a record. Without `index_dir` it is in a
    hidden folder next to the files, or else in ~/.cache/dalle.
    """
    digest = blake2b(f"{FORMAT} {kind}".encode("utf-8", "surrogateescape"), digest_size=12)
    for file in files:
        text = f"\n{os.path.realpath(file)} {file_status(file)}"
        digest.update(text.encode("utf-8", "surrogateescape"))
    name = f"{digest.hexdigest()}.index"
    problems = []
    for place in [index_dir] if index_dir else [files[0].parent / FOLDER, None]:
        try:
            folder = place or Path.home() / ".cache" / "dalle"
            with suppress(OSError, ValueError, LookupError, TypeError):
                return Index(folder / name, dtype)
            folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.NamedTemporaryFile(prefix=".partial-", dir=folder, delete=False)  # noqa: SIM115
        except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
            problems.append(str(error))
            continue
        path = Path(file.name)
        try:
            writer = IndexWriter(file)
            build(writer, files)
            writer.close()
            follow_umask(path)
            complete = folder / (name if writer.keep else f".partial-{name}")
            os.replace(path, complete)  # another process writes the same
            return Index(complete, dtype)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    raise ValueError(f"cannot write an index to disk: {'; '.join(problems)}; give another --data.index-dir")

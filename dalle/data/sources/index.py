"""Indexes: what is read once from tars and tables so that any sample is found at once later.

An index is a folder with `samples.bin` (fixed-size records), `text.bin` (texts that they point into) and
`meta.json`. Its name is a hash of the names, sizes and times of the files it was made from, so it is made
again when they change. It is written under another name and renamed when whole, and read memory-mapped.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dalle.types import BadSample

FORMAT = 1
"""Raised when what an index holds changes."""
FOLDER = ".dalle-index"
TRIES = 5
"""Times that a damaged index is removed while other processes may do the same."""


class Writer:
    """Appends to an index under construction."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.samples, self.text = (folder / "samples.bin").open("wb"), (folder / "text.bin").open("wb")
        self.skipped: list[BadSample] = []
        self.keep = True  # unset when a file could not be read this time but might be the next
        self._hash, self._at = hashlib.blake2b(digest_size=8), 0

    def put_text(self, data: bytes) -> tuple[int, int]:
        """Where it lies: offset and length."""
        self.text.write(data)
        self._hash.update(data)
        self._at += len(data)
        return self._at - len(data), len(data)

    def put(self, records: np.ndarray) -> None:
        """Appends records."""
        data = records.astype(self.dtype).tobytes()
        self.samples.write(data)
        self._hash.update(data)

    def close(self, **meta: Any) -> None:
        """Writes meta.json."""
        sizes = {name: file.tell() for name, file in (("samples", self.samples), ("text", self.text))}
        for file in (self.samples, self.text):
            file.close()
        skipped = [asdict(skip) for skip in self.skipped]
        whole = {
            "sizes": sizes,
            "hash": self._hash.hexdigest(),
            "keep": self.keep,
            "skipped": skipped,
            **meta,
        }
        (self.folder / "meta.json").write_text(json.dumps(whole), encoding="utf-8")


class Index:
    """A finished index. `samples` are records, `text(offset, length)` the bytes that they point to."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for name, size in self.meta["sizes"].items():
            if (folder / f"{name}.bin").stat().st_size != size:
                raise ValueError(f"{folder / name}.bin is not whole")
        self.hash = self.meta["hash"]
        self.skipped = [BadSample(**skip) for skip in self.meta["skipped"]]
        self.samples, self._text = self._map("samples", dtype), self._map("text", np.dtype(np.uint8))

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        file = self.folder / f"{name}.bin"
        return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)

    def text(self, offset: int, length: int) -> bytes:
        """Bytes put by `Writer.put_text`."""
        return self._text[int(offset) : int(offset) + int(length)].tobytes()

    def __reduce__(self):  # maps the files again in another process
        return Index, (self.folder, self.dtype)


def take_index(
    files: Sequence[Path],
    kind: str,
    dtype: np.dtype,
    build: Callable[[Writer, Sequence[Path]], dict],
    cache: Path | None,
) -> Index:
    """The index of these files: the one that lies there, or a new one.

    Args:
        files: what it is made from.
        kind: what else it depends on, in words.
        dtype: of a record.
        build: fills it and gives what meta.json shall hold besides.
        cache: where indexes lie. None takes a hidden folder beside the files, else the user's cache, else a
            temporary folder.
    """
    key = _key(files, kind)
    places = [cache] if cache else [files[0].parent / FOLDER, Path.home() / ".cache" / "dalle", None]
    for place in places:
        if place:
            with suppress(OSError, ValueError, LookupError):
                return Index(place / key, dtype)
    problem: OSError | None = None
    for place in places:
        try:
            partial = _partial(place, key)
        except OSError as error:
            problem = error
            continue
        return _build(partial, files, dtype, build, place / key if place else None)
    raise ValueError(f"cannot write an index to {cache} ({problem}); give another --data.index-dir")


def _key(files: Sequence[Path], kind: str) -> str:
    digest = hashlib.blake2b(f"{FORMAT} {kind}".encode(), digest_size=12)
    for file in files:
        status = file.stat()
        digest.update(
            f"\n{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()


def _partial(place: Path | None, key: str) -> Path:
    """A new folder to build in, one of its own for each process."""
    if place:
        place.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".partial-{key[:6]}-", dir=place))


def _build(
    partial: Path, files: Sequence[Path], dtype: np.dtype, build: Callable, final: Path | None
) -> Index:
    try:
        writer = Writer(partial, dtype)
        meta = build(writer, files)
        writer.close(**meta)
        if not writer.keep or final is None:
            return Index(partial, dtype)
        return _take_name(partial, final, dtype)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _take_name(partial: Path, final: Path, dtype: np.dtype) -> Index:
    """Renames a whole index, or takes the one that another process has made meanwhile."""
    own = Index(partial, dtype)  # what is mapped stays so, whatever another process does to the name
    for _ in range(TRIES):
        with suppress(OSError):
            os.replace(partial, final)
            own.folder = final
            return own
        with suppress(OSError, ValueError, LookupError):
            found = Index(final, dtype)
            shutil.rmtree(partial)
            return found
        shutil.rmtree(final, ignore_errors=True)  # what lies there is damaged
    return own


def progress(files: Sequence[Path], what: str):
    """The files, with a bar that shows how far the reading of them is."""
    return tqdm(files, desc=f"index of {what}", unit="file", disable=None, leave=False)

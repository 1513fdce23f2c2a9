"""WebDataset tars: members KEY.jpg (.png, .webp, ...) and KEY.txt or KEY.json, found by an index of offsets.

The index is built once for a set of tars. With it any sample is one read at a known place: the order is free,
no buffer is filled, and a tar may hold any number of samples for any number of workers.
"""

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from io import FileIO
from pathlib import Path, PurePosixPath

import numpy as np

from dalle.data.bad_samples import BadSampleError
from dalle.data.sources.captions import SUFFIXES, from_json, from_text
from dalle.data.sources.index import Writer, progress, take_index
from dalle.data.sources.names import share
from dalle.data.sources.tar_members import Member, members
from dalle.types import BadSample, RawSample

PLACE = [("at", "<u8"), ("size", "<u4")]
SAMPLE = np.dtype(
    [("tar", "<u4"), ("share", "<u4"), ("name", PLACE), ("image", PLACE), ("text", PLACE), ("json", PLACE)]
)
OPEN_FILES = 64
PROCESSES_FROM = 16
"""So many tars are indexed by several processes."""


class TarSource:
    """Samples of tars in the order of their names; keys are unique within a tar.

    Args:
        files: uncompressed tars.
        caption_column: the key of the captions in JSON; then `.json` goes before `.txt`.
        cache: where the index lies; see `take_index`.

    Raises:
        ValueError: no image with captions in any of them.
    """

    def __init__(self, files: Sequence[Path], caption_column: str | None = None, cache: Path | None = None):
        self.files, self.caption_column = list(files), caption_column
        self._index = take_index(files, "tars", SAMPLE, build_index, cache)
        self.hash, self.skipped = self._index.hash, self._index.skipped
        if not len(self):
            said = "; ".join(f"{skip.name}: {skip.cause}, {skip.detail}" for skip in self.skipped[:3])
            raise ValueError(
                f"{len(self.files)} tars from {self.files[0]} on hold no KEY.jpg (.png, .webp, ...) with KEY.txt or "
                f"KEY.json beside it" + f" ({said})" * bool(said)
            )
        self._open = _OpenFiles()

    def __len__(self) -> int:
        return len(self._index.samples)

    def name(self, index: int) -> str:
        """ "train-0003.tar/000123"."""
        return self._index.text(*self._index.samples[index]["name"]).decode("utf-8", "surrogatepass")

    def shares(self) -> np.ndarray:
        """uint32 (N,), a hash of each name."""
        return self._index.samples["share"]

    def read(self, index: int) -> RawSample:
        """BadSampleError, naming the sample and the cause, for one that cannot be read."""
        return RawSample(self.name(index), self._bytes(index, "image"), self.captions(index))

    def captions(self, index: int) -> list[str]:
        """Those of `read`, without reading the image."""
        sample = self._index.samples[index]
        if sample["json"]["at"] and (self.caption_column or not sample["text"]["at"]):
            return from_json(self._bytes(index, "json"), self.name(index), self.caption_column)
        return from_text(self._bytes(index, "text"), self.name(index))

    def _bytes(self, index: int, what: str) -> bytes:
        sample = self._index.samples[index]
        file, (at, size) = self.files[sample["tar"]], sample[what].tolist()
        try:
            data = os.pread(self._open(file), size, at)
        except OSError as error:
            raise BadSampleError(self.name(index), "unreadable shard", f"{file}: {error.strerror}") from None
        if len(data) != size:
            raise BadSampleError(self.name(index), "unreadable shard", f"{file} has become shorter")
        return data


class _OpenFiles:
    """The files read last, kept open; another process opens its own."""

    def __init__(self):
        self.files: OrderedDict[Path, FileIO] = OrderedDict()

    def __call__(self, file: Path) -> int:
        if file not in self.files:
            if len(self.files) >= OPEN_FILES:
                self.files.popitem(last=False)[1].close()
            self.files[file] = FileIO(file)
        self.files.move_to_end(file)
        return self.files[file].fileno()

    def __reduce__(self):
        return _OpenFiles, ()


def build_index(writer: Writer, files: Sequence[Path]) -> dict:
    """Scans the tars and appends their samples; what meta.json shall hold besides."""
    many = len(files) >= PROCESSES_FROM
    with ProcessPoolExecutor() if many else nullcontext() as pool:
        scans = pool.map(scan_tar, files) if many else map(scan_tar, files)
        for number, (_, scan) in enumerate(zip(progress(files, "tars"), scans, strict=True)):
            samples, names, skipped, readable = scan
            start, _ = writer.put_text(names)
            samples["tar"] = number
            samples["name"]["at"] += start
            writer.put(samples)
            writer.skipped += skipped
            writer.keep &= readable
    return {}


def scan_tar(file: Path) -> tuple[np.ndarray, bytes, list[BadSample], bool]:
    """Its samples, their names one after another, what is unusable, and whether it could be read at all."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            found = list(members(descriptor))
            start = os.pread(descriptor, 6, 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        return (
            _records([]),
            b"",
            [BadSample(None, file.name, "unreadable shard", error.strerror or str(error))],
            False,
        )
    if all(member.damage for member in found):
        packed = start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        detail = (
            "compressed: unpack it, images are already" if packed else "empty" if not found else "not a tar"
        )
        return _records([]), b"", [BadSample(None, file.name, "unreadable shard", detail)], True
    rows, names, skipped = _group(found, file.name)
    return _records(rows), names, skipped, True


def _records(rows: Iterable[tuple]) -> np.ndarray:
    return np.array(list(rows), SAMPLE)


def _group(found: Sequence[Member], tar: str) -> tuple[list[tuple], bytes, list[BadSample]]:
    """Samples of one tar: members of the same key together."""
    keys: dict[str, dict[str, tuple[int, int]]] = {}
    damaged: dict[str, BadSample] = {}
    for member in found:
        key, what = _key(member.name)
        damage, cause = member.damage, "broken tar member"
        if not damage and _unsafe(member.name):
            damage, cause = "its name leads out of the folder", "leaves the folder"
        if not damage and what in ("txt", "json") and what in keys.get(key, ()):
            damage = f"a second .{what}"
        if damage and (what or not member.name):
            name = member.name or f"byte {member.offset}"
            damaged.setdefault(key or name, BadSample(None, f"{tar}/{name}", cause, damage))
        elif what:
            keys.setdefault(key, {}).setdefault(what, (member.offset, member.size))
    rows, names, skipped = [], bytearray(), list(damaged.values())
    for key, parts in keys.items():
        if key in damaged:
            continue
        name = f"{tar}/{key}"
        if "image" not in parts or len(parts) == 1:
            lacks = "captions without an image" if "image" not in parts else "an image without .txt or .json"
            skipped.append(BadSample(None, name, "missing twin", lacks))
            continue
        data = name.encode("utf-8", "surrogatepass")
        places = [parts.get(what, (0, 0)) for what in ("image", "txt", "json")]
        rows.append((0, share(name), (len(names), len(data)), *places))
        names += data
    return rows, bytes(names), skipped


def _key(name: str) -> tuple[str, str]:
    """The key of a member (its path up to the first dot of the file name) and what it is, "" for neither."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    suffix = suffix.lower()
    if not stem:
        return key, ""
    return key, "image" if f".{suffix}" in SUFFIXES else suffix if suffix in ("txt", "json") else ""


def _unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in PurePosixPath(name).parts

"""WebDataset tars: members KEY.jpg (.png, .webp, ...) and KEY.txt or KEY.json, read by an index of offsets.

With the index, built once, any sample is one read at a known offset, so the order is free. Nothing is
unpacked; symbolic links are not followed.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from dalle.data.bad_samples import BadSampleError, examples_text
from dalle.data.sources.captions import parse_json_captions, parse_text
from dalle.data.sources.image_folder import MAX_BYTES, pair_files, split_name
from dalle.data.sources.index import IndexWriter, file_status, name_hash, open_or_build_index
from dalle.types import BadSample, RawSample

SPAN = [("at", "<u8"), ("size", "<u4")]
SAMPLE = np.dtype(
    [("tar", "<u4"), ("share", "<u4"), ("name", SPAN), ("image", SPAN), ("text", SPAN), ("json", SPAN)]
)
MAX_OPEN_FILES = 64
POOL_FROM = 16
"""Number of tars from which several processes build the index."""
MAX_HEADER, MAX_DEPTH = 2**20, 8
"""Bytes of a long name or other extension of a header, and how many may precede a member."""
EXTENSIONS = b"LKxgX"
"""Types of such extensions."""
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class TarSource:
    """The samples of uncompressed tars in order; keys are unique within a tar.

    If `caption_column` is given, a key of JSON, `.json` is preferred to `.txt`.
    """

    def __init__(
        self, files: Sequence[Path], caption_column: str | None = None, index_dir: Path | None = None
    ):
        self.files, self.caption_column = list(files), caption_column
        self._index = open_or_build_index(files, "tars", SAMPLE, build_index, index_dir)
        self.hash, self.skipped = self._index.hash, self._index.skipped
        if not len(self):
            problem = f"{len(files)} tars from {files[0]} on hold no image KEY.jpg with KEY.txt or KEY.json"
            raise ValueError(f"{problem}; left out {examples_text(self.skipped)}")
        self._status, self._files = list(map(file_status, files)), dict[Path, FileIO]()

    def __len__(self) -> int:
        return len(self._index.samples)

    def name(self, index: int) -> str:
        return self._index.text(*self._index.samples[index]["name"]).decode("utf-8", "surrogatepass")

    def shares(self) -> np.ndarray:
        return self._index.samples["share"]

    def read(self, index: int) -> RawSample:
        return RawSample(self.name(index), self._bytes(index, "image"), self.captions(index))

    def captions(self, index: int) -> list[str]:
        sample = self._index.samples[index]
        if sample["json"]["at"] and (self.caption_column or not sample["text"]["at"]):
            return parse_json_captions(self._bytes(index, "json"), self.name(index), self.caption_column)
        return parse_text(self._bytes(index, "text"), self.name(index))

    def _bytes(self, index: int, field: str) -> bytes:
        sample = self._index.samples[index]
        number, (at, size) = int(sample["tar"]), sample[field].tolist()
        try:
            data = os.pread(self._descriptor(number), size, at)
            if len(data) == size:
                return data
            problem = "it has become shorter"
        except OSError as error:
            problem = error.strerror
        raise BadSampleError(self.name(index), "unreadable shard", f"{self.files[number]}: {problem}")

    def _descriptor(self, number: int) -> int:
        if number not in self._files:
            if file_status(self.files[number]) != self._status[number]:
                raise OSError(0, "it has changed since its index was read; start again")
            if len(self._files) >= MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[number] = FileIO(self.files[number])
        return self._files[number].fileno()

    def __getstate__(self):  # another process opens its own files
        return self.__dict__ | {"_files": {}}


class LenientTarInfo(tarfile.TarInfo):
    """A header; behind one that tarfile cannot read, whatever it raises, the search continues."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        start, tar.depth = tar.offset, getattr(tar, "depth", 0) + 1
        try:
            member = super().fromtarfile(tar)
            member.offset = start  # of a global header before it, too
            return member
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            raise
        except Exception as error:  # a number of 5,000 digits gives a ValueError
            tar.offset = start
            tar.fileobj.seek(start + tarfile.BLOCKSIZE)
            raise tarfile.InvalidHeaderError(str(error)) from None
        finally:
            tar.depth -= 1

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:  # made to be overridden, says tarfile
        if tar.depth > MAX_DEPTH or (self.type in EXTENSIONS and not 0 <= self.size <= MAX_HEADER):
            raise tarfile.InvalidHeaderError("a header that is too long")
        return super()._proc_member(tar)


class Member(NamedTuple):
    """A file in a tar; `damage` says why it cannot be used."""

    name: str
    offset: int
    size: int
    damage: str = ""


def build_index(writer: IndexWriter, files: Sequence[Path]) -> None:
    """Scans the tars and appends their samples."""
    with ProcessPoolExecutor() if len(files) >= POOL_FROM else nullcontext() as pool:
        scans = pool.map(scan_tar, files) if pool else map(scan_tar, files)
        scans = tqdm(scans, "index", len(files), leave=False, unit="file", disable=None)
        for number, (samples, names, skipped, readable) in enumerate(scans):
            samples["tar"] = number
            samples["name"]["at"] += writer.add_text(names)[0]
            writer.add(samples)
            writer.skipped += skipped
            writer.keep &= readable


def scan_tar(file: Path) -> tuple[np.ndarray, bytes, list[BadSample], bool]:
    """(samples, their names end to end, bad samples, whether the file could be read)."""
    problem, readable, members = "", True, []
    try:
        with file.open("rb") as opened:
            start = opened.read(6)
            problem = "not a tar" if any(start) else "empty"
            if start.startswith(COMPRESSED):
                problem = "compressed: unpack it, images are compressed already"
            members = list(_members(file, opened))
    except OSError as error:
        problem, readable = error.strerror or str(error), False
    if not any(member.name for member in members):
        return np.empty(0, SAMPLE), b"", [BadSample(None, file.name, "unreadable shard", problem)], readable
    return (*_group(members, file.name), True)


def _members(file: Path, opened: BinaryIO) -> Iterator[Member]:
    """The files in a tar. A damaged header costs one member: the next sound header is searched for."""
    size, expected, places = os.fstat(opened.fileno()).st_size, 0, dict[str, tuple[int, int]]()
    options = {"ignore_zeros": True, "encoding": "utf-8", "tarinfo": LenientTarInfo}
    with suppress(tarfile.TarError), tarfile.open(file, "r:", **options) as tar:
        while (member := tar.next()) is not None:
            if expected is not None:
                yield from _damage_between(opened, expected, member.offset)
            end = tar.offset if member.issparse() else member.offset_data + member.size
            if not member.offset_data <= end <= size:
                yield Member(member.name, member.offset, 0, "its size is wrong, or the tar breaks off in it")
                tar.offset, expected = member.offset_data, None  # the next header may be anywhere
                continue
            if member.isreg() and not member.issparse():
                places[member.name] = member.offset_data, member.size
                yield Member(member.name, member.offset_data, member.size)
            elif member.islnk() and member.linkname in places:  # tar writes a file of two names so
                yield Member(member.name, *places[member.linkname])
            elif not member.isdir():
                yield Member(member.name, member.offset, 0, "a link or a special file, not followed")
            expected = tar.offset
    if expected is not None:
        yield from _damage_between(opened, expected, size)
        if expected >= size:
            yield Member("", size, 0, "no end mark: the tar breaks off before it")


def _damage_between(opened: BinaryIO, start: int, end: int) -> Iterator[Member]:
    """The first damage between two headers, or up to the end. A few zeros are padding."""
    for offset in range(start, end, tarfile.BLOCKSIZE):
        block = os.pread(opened.fileno(), tarfile.BLOCKSIZE, offset)
        if any(block):
            name = block[:100].split(b"\0")[0] if block[257:262] == b"ustar" else b""
            yield Member(os.fsdecode(name), offset, 0, f"no sound header at byte {offset}")
            return


def _group(members: Sequence[Member], tar: str) -> tuple[np.ndarray, bytes, list[BadSample]]:
    """Samples of one tar, and the members that belong to none."""
    spans: dict[str, tuple[int, int]] = {}
    skipped: list[BadSample] = []
    for member in members:
        name = f"{tar}/{member.name or f'byte {member.offset}'}"
        damage, cause, kind = member.damage, "broken tar member", split_name(name)[1]
        if re.search(r"(^|/)\.[^./]", member.name):
            continue  # hidden
        if not damage and (member.name.startswith("/") or ".." in PurePosixPath(member.name).parts):
            damage, cause = "its name leads out of the folder", "leaves the folder"
        elif not damage and name in spans:
            damage = "a second member of this name"
        elif not damage and kind and member.size > MAX_BYTES[kind]:
            damage = f"{member.size} bytes, expected at most {MAX_BYTES[kind]}"
        if damage:
            skipped.append(BadSample(None, name, cause, damage))
        else:
            spans[name] = member.offset, member.size
    rows, names = [], bytearray()
    for stem, sample in pair_files(spans, skipped, [bad.name for bad in skipped]).items():
        captions = [spans[sample[kind][0]] if kind in sample else (0, 0) for kind in ("txt", "json")]
        for image in sample["image"]:  # images of one stem are in one split
            name = (stem if image is sample["image"][0] else image).encode("utf-8", "surrogatepass")
            rows.append((0, name_hash(stem), (len(names), len(name)), spans[image], *captions))
            names += name
    return np.array(rows, SAMPLE), bytes(names), skipped

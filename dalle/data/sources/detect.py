"""What lies at a path: the kind of data, the files, and which of them the set itself keeps for evaluation."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle.data.config import Format
from dalle.data.sources import hf_datasets
from dalle.data.sources.captions import SUFFIXES
from dalle.data.sources.image_folder import CAPTION_SUFFIXES, walk

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
BRACES = re.compile(r"\{([^{}]*)\}")
HELD_OUT = re.compile(r"(val|valid|validation|dev|held[-_]?out)([-_.\d]|$)", re.IGNORECASE)
TEST = re.compile(r"test([-_.\d]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class DataLocation:
    """Where data lie."""

    kind: Format
    """folder, table, tars or hub."""
    path: str
    """As given."""
    files: tuple[Path, ...] = ()
    """Tables or tars, by name; those of the set's own test part are left out where there are others."""
    held_out: tuple[Path, ...] = ()
    """Those of them that the set keeps for evaluation: named val*, validation* or dev*."""

    @property
    def train(self) -> tuple[Path, ...]:
        """The other files."""
        return tuple(file for file in self.files if file not in self.held_out)


def detect_source(path: str, kind: Format = "auto") -> DataLocation:
    """What lies at a path, a pattern with *, ? and {000..099}, or a folder.

    Raises:
        ValueError: nothing, or nothing that is known; says what was found and what is expected.
    """
    if kind == "hub":
        return DataLocation("hub", path)
    if re.match(r"[a-z0-9]+:", path) and not Path(path).exists():
        raise ValueError(f"{path} is not on a disk; copy or mount it, and give the path")
    root = Path(path).expanduser()
    files = [root] if root.is_file() else [] if root.is_dir() else list(_matches(str(root)))
    if root.is_dir() and kind in ("auto", "folder"):
        kind = "folder" if kind == "folder" else _kind_of_folder(root)
    if kind == "folder":
        return DataLocation("folder", str(root))
    if root.is_dir() and kind == "hub":
        return DataLocation("hub", str(root))
    files = files or _files(root, kind)
    if kind == "auto":
        kind = _kind_of_files(files, path)
    if not files:
        raise ValueError(
            f"no {kind} at {path}; expected {'.tar files' if kind == 'tars' else ', '.join(TABLES)}"
        )
    return _parted(kind, path, files)


def expand_braces(pattern: str) -> Iterator[str]:
    """ "a-{08..10}.tar" gives a-08.tar, a-09.tar, a-10.tar; "{a,b}.csv" gives a.csv, b.csv."""
    found = BRACES.search(pattern)
    if not found:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    words = found[1].split(",")
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        words = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    for word in words:
        yield from expand_braces(pattern[: found.start()] + word + pattern[found.end() :])


def _matches(pattern: str) -> Iterator[Path]:
    """Files of a pattern; ValueError names the first that braces promise and that is not there."""
    if not any(mark in pattern for mark in "*?[{"):
        raise ValueError(f"nothing lies at {pattern}; give a folder, a table or tars, or the word shapes")
    for part in expand_braces(pattern):
        found = sorted(glob.glob(part, recursive=True)) if any(mark in part for mark in "*?[") else [part]
        for name in found:
            if not os.path.isfile(name):
                raise ValueError(f"no file {name}, which {pattern} names")
            yield Path(name)
        if not found:
            raise ValueError(f"no file fits {part}")


def _files(root: Path, kind: str) -> list[Path]:
    suffixes = (".tar",) if kind == "tars" else TABLES
    found = []
    with os.scandir(root) as entries:
        for entry in entries:  # the name is asked first: a folder may hold millions of other files
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in suffixes and not entry.name.startswith(".") and entry.is_file():
                found.append(root / entry.name)
    return sorted(found)


def _kind_of_folder(root: Path) -> Format:
    """By what lies in it: a saved data set, tars, images with captions beside them, tables; else images."""
    if hf_datasets.is_saved(root):
        return "hub"
    if _files(root, "tars"):
        return "tars"
    return "table" if _files(root, "table") and not _has_pair(root) else "folder"


def _has_pair(root: Path) -> bool:
    for _, files in walk(root, []):
        stems = {os.path.splitext(file)[0] for file in files if file.endswith(CAPTION_SUFFIXES)}
        if any(os.path.splitext(file)[0] in stems for file in files if file.lower().endswith(SUFFIXES)):
            return True
    return False


def _kind_of_files(files: Sequence[Path], path: str) -> Format:
    suffixes = {file.suffix.lower() for file in files}
    if suffixes == {".tar"}:
        return "tars"
    if suffixes and suffixes <= set(TABLES):
        return "table"
    raise ValueError(
        f"{path} is {', '.join(sorted(suffixes)) or 'a file without suffix'}; expected a folder of images, "
        f".tar files (not compressed) or a table ({', '.join(TABLES)})"
    )


def _parted(kind: Format, path: str, files: Sequence[Path]) -> DataLocation:
    """The files with the set's own parts told apart."""
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1:
        raise ValueError(
            f"{path} holds tables of several kinds ({', '.join(sorted(suffixes))}); give one of them"
        )
    used = [file for file in files if not TEST.match(file.name)] or list(files)
    held_out = [file for file in used if HELD_OUT.match(file.name)]
    return DataLocation(kind, path, tuple(used), tuple(held_out) if len(held_out) < len(used) else ())

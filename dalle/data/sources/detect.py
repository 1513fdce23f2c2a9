"""Detection of a data source: its format, its files, and its own validation split."""

import glob
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dalle.data.config import Format
from dalle.data.sources import hf_datasets
from dalle.data.sources.image_folder import find_images

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
BRACES = re.compile(r"\{([^{}]*)\}")
VAL = re.compile(r"(val|valid|validation|dev|held[-_]?out)([-_.\d]|$)", re.IGNORECASE)
TEST = re.compile(r"test([-_.\d]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class DataLocation:
    """Format and files of a data source."""

    format: Format
    path: str
    files: tuple[Path, ...] = ()
    """Tables or tars by name, without a test split of the dataset's own."""
    val: tuple[Path, ...] = ()
    """The validation split among them: files named val*, validation* or dev*."""
    unused: tuple[Path, ...] = ()
    """What else is in a folder of tars, and the test split."""


def detect_source(path: str, format: Format = "auto") -> DataLocation:
    """The source at a path: a file, a folder, or a pattern with *, ? and {000..099}.

    ValueError says what is expected if there is nothing, or no known format.
    """
    try:
        return _detect(path, format)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None


def _detect(path: str, format: Format) -> DataLocation:
    if re.match(r"[a-z0-9]+:", path) and not Path(path).exists():
        raise ValueError(f"{path} is not on a disk; copy or mount it, and give the path")
    root = Path(os.path.expanduser(path))  # leaves the name of an unknown user as it is
    if root.is_dir() and format == "auto":
        format = _folder_format(root)
    if format in ("folder", "hub"):
        return DataLocation(format, str(root))
    if root.is_dir():
        files = _list_files(root, format)
    else:
        files = [root] if root.is_file() else list(_expand(str(root)))
    suffixes = {file.suffix.lower() for file in files}
    if format == "auto":
        if not suffixes <= {".tar", *TABLES}:
            found = ", ".join(sorted(suffixes)) or "without suffix"
            expected = f"a folder of images, .tar files (not compressed) or a table ({', '.join(TABLES)})"
            raise ValueError(f"{path} is {found}; expected {expected}")
        format = "tars" if ".tar" in suffixes else "table"
    if not files:
        expected = ".tar files" if format == "tars" else ", ".join(TABLES)
        raise ValueError(f"no {format} at {path}; expected {expected}")
    if len(suffixes) > 1:
        raise ValueError(f"{path} holds several formats ({', '.join(sorted(suffixes))}); give one of them")
    used = [file for file in files if not TEST.match(file.name)] or files
    val = [file for file in used if VAL.match(file.name)]
    if format == "tars" and root.is_dir():
        files = [root / name for name in os.listdir(root) if name[0] != "."]
    by_img2dataset = {f"{file.stem}{end}" for file in used for end in (".parquet", "_stats.json")}
    unused = sorted(file for file in set(files) - set(used) if file.name not in by_img2dataset)
    return DataLocation(format, path, tuple(used), tuple(val) if len(val) < len(used) else (), tuple(unused))


def expand_braces(pattern: str) -> Iterator[str]:
    """ "a-{08..10}.tar" -> a-08.tar, a-09.tar, a-10.tar; "{a,b}.csv" -> a.csv, b.csv."""
    found = BRACES.search(pattern)
    if not found:
        yield pattern
        return
    words: Iterable[str] = found[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        width, first, last = len(numbers[1]), int(numbers[1]), int(numbers[2])
        words = (str(number).zfill(width) for number in range(first, last + 1))
    for word in words:
        yield from expand_braces(pattern[: found.start()] + word + pattern[found.end() :])


def _expand(pattern: str) -> Iterator[Path]:
    """The files of a pattern, whose folders and brackets are literal if they exist; ValueError for none."""
    if not any(mark in pattern for mark in "*?[{"):
        raise ValueError(f"nothing at {pattern}; give a folder, a table or tars, or the word shapes")
    folder = next(parent for parent in Path(pattern).parents if os.path.isdir(parent))
    for part in expand_braces(str(Path(pattern).relative_to(folder))):
        literal = glob.glob(part.replace("[", "[[]"), root_dir=folder, recursive=True)
        for name in sorted(literal or glob.glob(part, root_dir=folder, recursive=True)) or [part]:
            if not os.path.isfile(folder / name):
                raise ValueError(f"no file matches {folder / name}")
            yield folder / name


def _list_files(root: Path, format: str) -> list[Path]:
    suffixes = (".tar",) if format == "tars" else TABLES
    names = (name for name in os.listdir(root) if name.lower().endswith(suffixes) and name[0] != ".")
    return sorted(path for name in names if not (path := root / name).is_dir())  # a broken link is counted


def _folder_format(root: Path) -> Format:
    """By content: a saved dataset, tars, captioned images, tables, else images."""
    if hf_datasets.is_saved(root):
        return "hub"
    if _list_files(root, "tars"):
        return "tars"
    # keeps no list of the images without captions: a table may stand next to millions
    return "table" if _list_files(root, "table") and not any(find_images(root, deque(maxlen=0))) else "folder"

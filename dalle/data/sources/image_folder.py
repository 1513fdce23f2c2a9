"""Folders of images, each with its captions in a .txt or .json file of the same stem in the same folder."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dalle.data.bad_samples import BadSampleError, examples_text
from dalle.data.config import IMAGE_SUFFIXES, UNUSED
from dalle.data.sources.captions import parse_json_captions, parse_text
from dalle.data.sources.index import name_hashes
from dalle.types import BadSample, RawSample

_SPELLINGS = *product(".", "tT", "xX", "tT"), *product(".", "jJ", "sS", "oO", "nN")
CAPTION_SUFFIXES = ["".join(letters) for letters in _SPELLINGS]
"""Suffixes of caption files, .txt before .json and lower case before upper; the first that exists is read."""
MAX_BYTES = {"image": 2**30, "txt": 2**24, "json": 2**24}
"""Of a file, by its kind: a larger one is not read."""
OUTSIDE = "which is not read; give a folder that holds links and files, or a copy without links (cp -rL)"
LEFT_OUT = {"image": "an image without .txt or .json next to it", "": "neither an image nor captions"}
LEFT_OUT |= dict.fromkeys(("txt", "json"), "captions without an image of the same name")
"""Why a file belongs to no sample, by its kind."""
Samples = dict[str, dict[str, list[str]]]  # stem, a path up to its last dot -> image, txt or json -> files


class FolderSource:
    """Images below a folder, sorted by name. Hidden files and folders are ignored.

    `skipped` lists what belongs to no sample, and symbolic links out of the folder, which are not followed.

    If `caption_column` is given, a key of JSON, `.json` is preferred to `.txt`.

    Raises:
        ValueError: no folder, or no image with captions in it.
    """

    def __init__(self, folder: Path, caption_column: str | None = None):
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}; expected images with a .txt of the same name next to each")
        self.caption_column, self._root = caption_column, folder.resolve()
        self._suffixes = sorted(CAPTION_SUFFIXES, key=len, reverse=bool(caption_column))
        self.skipped: list[BadSample] = []
        self._names = np.array([os.fsencode(name) for name in find_images(folder, self.skipped)], np.bytes_)
        if not len(self._names):
            problem = f"{folder} has no image (.jpg, .png, ...) with a .txt or .json of the same name"
            raise ValueError(f"{problem}; left out {examples_text(self.skipped)}")
        self.hash = hashlib.blake2b(self._names.tobytes(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return os.fsdecode(self._names[index])

    def shares(self) -> np.ndarray:
        return name_hashes(map(self.name, range(len(self))))

    def read(self, index: int) -> RawSample:
        captions, name = self.captions(index), self.name(index)
        return RawSample(name, read_inside(self._root, name, "unreadable image"), captions)

    def captions(self, index: int) -> list[str]:
        stem = os.path.splitext(self.name(index))[0]
        existing = (stem + suffix for suffix in self._suffixes if (self._root / (stem + suffix)).is_file())
        found = next(existing, f"{stem}.txt")
        data = read_inside(self._root, found, "missing twin")
        if found.lower().endswith(".json"):
            return parse_json_captions(data, found, self.caption_column)
        return parse_text(data, found)


def read_inside(root: Path, name: str, cause: str) -> bytes:
    """A file below a resolved folder; BadSampleError if unreadable, or outside by a link or `..`."""
    try:
        path, limit = (root / name).resolve(strict=True), MAX_BYTES[split_name(name)[1] or "image"]
        if path.is_relative_to(root):
            if not path.is_file() or path.stat().st_size > limit:
                raise ValueError(f"expected a file of at most {limit} bytes")
            return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a cycle of links, before Python 3.13
        raise BadSampleError(name, cause, getattr(error, "strerror", None) or str(error)) from None
    raise BadSampleError(name, "leaves the folder", f"it is {path}, {OUTSIDE}")


def read_listed(root: Path, value: Any, name: str) -> bytes:
    """The image of a row: its bytes, a path, or a mapping with "bytes" and "path" as of Hugging Face.

    Backslashes are separators, unless a file is so named.
    """
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        windows = "\\" in value and not os.path.lexists(os.path.join(root, value))
        value = read_inside(root, value.replace("\\", "/") if windows else value, "missing twin")
    if not isinstance(value, bytes):
        raise BadSampleError(name, "missing twin", "a row without an image")
    return value


def find_images(root: Path, skipped: MutableSequence[BadSample]) -> Iterator[str]:
    """Images with captions below a root, sorted by folder; what is left out goes to `skipped`."""

    def skip(path: str, cause: str, detail: str) -> None:
        bad.append(Path(path).relative_to(root).as_posix())
        skipped.append(BadSample(None, bad[-1], cause, detail))

    resolved, bad = root.resolve(), list[str]()
    walk = os.walk(root, onerror=lambda error: skip(error.filename, "unreadable folder", error.strerror))
    for folder, folders, names in walk:
        files, below = [], Path(folder).relative_to(root)
        bad.clear()
        for name in sorted(name for name in folders + names if not name.startswith(".")):
            path = os.path.join(folder, name)
            if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(resolved):
                skip(path, "leaves the folder", f"it is {os.path.realpath(path)}, {OUTSIDE}")
            elif os.path.isfile(path):
                files.append((below / name).as_posix())
            elif not os.path.isdir(path):
                skip(path, "missing twin", "no file that can be read")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        samples = pair_files(files, skipped, bad)
        yield from sorted(image for sample in samples.values() for image in sample["image"])


def pair_files(names: Iterable[str], skipped: MutableSequence[BadSample], bad: Sequence[str]) -> Samples:
    """The samples among files, whatever dots are in their names; other files go to `skipped`.

    STEM.seg.png belongs to the sample STEM; what lacks one of the `bad` files is counted with that file.
    """
    files = [(name, *split_name(name)) for name in names]
    images = {stem for _, stem, kind in files if kind == "image"}
    captions = {stem for _, stem, kind in files if kind in ("txt", "json")}
    samples: Samples = {}
    for name, stem, kind in files:
        if kind and stem in images and stem in captions:
            samples.setdefault(stem, {}).setdefault(kind, []).append(name)
    for kind, sample in product(("txt", "json"), samples.values()):
        sample.get(kind, []).sort(key=str.swapcase)  # a.txt before a.TXT
        for name in sample.get(kind, [])[1:]:
            skipped.append(BadSample(None, name, UNUSED, "another file has the captions of this sample"))
    known = samples.keys() | {stem for stem, kind in map(split_name, bad) if kind}
    for name, stem, kind in files:
        while stem not in known and (word := re.search(r"\.[A-Za-z_]\w*$", stem)):
            stem = stem[: word.start()]
        if stem not in known:
            skipped.append(BadSample(None, name, "missing twin" if kind else UNUSED, LEFT_OUT[kind]))
    return samples


def split_name(name: str) -> tuple[str, str]:
    """The stem of a file, and what its suffix stands for: image, txt, json or ""."""
    stem, suffix = os.path.splitext(name)
    kind = "image" if suffix.lower() in IMAGE_SUFFIXES else suffix[1:].lower()
    return stem, kind if kind in LEFT_OUT else ""

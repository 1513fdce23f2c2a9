"""A folder of images, each with its captions in a file of the same stem in the same folder."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dalle.data.bad_samples import BadSampleError
from dalle.data.sources.captions import SUFFIXES, from_json, from_text
from dalle.data.sources.names import Names, share
from dalle.types import BadSample, RawSample

CAPTION_SUFFIXES = (".txt", ".TXT", ".json", ".JSON")
"""Of the twin of an image; the first that is there is read."""


class FolderSource:
    """Images below a folder, in the order of their names; `.txt` (a caption a line) goes before `.json`.

    Images without captions are told in `skipped`. Links are followed within the folder alone; hidden files
    and folders are left alone.

    Args:
        folder: where the images lie.
        caption_column: the key of the captions in JSON; then `.json` goes before `.txt`.

    Raises:
        ValueError: no folder, or no image with captions in it.
    """

    def __init__(self, folder: Path, caption_column: str | None = None):
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}; expected images with a .txt of the same name beside each")
        self.folder, self.caption_column = folder, caption_column
        self._root = folder.resolve()
        self.skipped: list[BadSample] = []
        self._names = Names(self._pairs())
        if not len(self._names):
            raise ValueError(
                f"{folder} has {len(self.skipped)} images ({', '.join(SUFFIXES)}), none with a .txt of the same name"
            )
        self.hash = self._names.digest()

    def _pairs(self) -> Iterator[str]:
        """Images that have captions; the others are noted."""
        for folder, files in walk(self.folder, self.skipped):
            there = set(files)
            for file in files:
                stem, suffix = os.path.splitext(file)
                if suffix.lower() not in SUFFIXES:
                    continue
                name = f"{folder}/{file}" if folder else file
                if any(stem + caption in there for caption in CAPTION_SUFFIXES):
                    yield name
                else:
                    self.skipped.append(
                        BadSample(None, name, "missing twin", "an image without .txt or .json beside it")
                    )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The place of the image within the folder."""
        return self._names[index]

    def shares(self) -> np.ndarray:
        """uint32 (N,), a hash of each name."""
        return np.fromiter((share(self._names[i]) for i in range(len(self))), np.uint32, len(self))

    def read(self, index: int) -> RawSample:
        """BadSampleError, naming the sample and the cause, for one that cannot be read."""
        name = self._names[index]
        captions = self.captions(index)
        return RawSample(name, read_inside(self._root, name, "unreadable image"), captions)

    def captions(self, index: int) -> list[str]:
        """Those of `read`, without reading the image."""
        stem = os.path.splitext(self._names[index])[0]
        suffixes = CAPTION_SUFFIXES[::-1] if self.caption_column else CAPTION_SUFFIXES
        found = next((stem + suffix for suffix in suffixes if (self._root / (stem + suffix)).is_file()), None)
        if found is None:
            raise BadSampleError(self._names[index], "missing twin", "its .txt or .json is gone")
        data = read_inside(self._root, found, "missing twin")
        if found.lower().endswith(".json"):
            return from_json(data, found, self.caption_column)
        return from_text(data, found)


def read_inside(root: Path, name: str, cause: str) -> bytes:
    """A file below a resolved folder; BadSampleError for one that cannot be read or lies elsewhere by a link or `..`."""
    try:
        path = (root / name).resolve(strict=True)
        if not path.is_relative_to(root):
            raise BadSampleError(name, "leaves the folder", f"it is {path}")
        return path.read_bytes()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # RuntimeError: links in a circle, before Python 3.13
        if isinstance(error, BadSampleError):
            raise
        raise BadSampleError(name, cause, getattr(error, "strerror", None) or str(error)) from None


def read_listed(root: Path, path: str) -> bytes:
    """The image of a path in a table; backslashes are slashes, as Windows writes them, unless a file is so named."""
    windows = "\\" in path and not os.path.lexists(os.path.join(root, path))
    return read_inside(root, path.replace("\\", "/") if windows else path, "missing twin")


def walk(root: Path, skipped: list[BadSample]) -> Iterator[tuple[str, Sequence[str]]]:
    """(folder, names of its files) below a root, sorted; what leads out of it is noted and left."""
    resolved, todo = root.resolve(), [""]
    while todo:
        folder = todo.pop()
        files, folders, foreign = [], [], []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                place = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(resolved):
                    foreign.append(
                        BadSample(None, place, "leaves the folder", f"it is {os.readlink(entry.path)}")
                    )
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(place)
                elif entry.is_file(follow_symlinks=False) or os.path.isfile(
                    entry.path
                ):  # links in a circle are none
                    files.append(entry.name)
        skipped += sorted(foreign, key=lambda skip: skip.name)
        todo += sorted(folders, reverse=True)
        files.sort()
        yield folder, files

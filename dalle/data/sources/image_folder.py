"""Folders of images, each with its captions in a .txt or .json file of the same stem in the same folder."""

import hashlib
import os
from collections.abc import Iterator, MutableSequence
from pathlib import Path

import numpy as np

from dalle.data.bad_samples import BadSampleError
from dalle.data.config import IMAGE_SUFFIXES
from dalle.data.sources.captions import parse_json, parse_text
from dalle.data.sources.index import name_hashes
from dalle.types import BadSample, RawSample

CAPTION_SUFFIXES = (".txt", ".TXT", ".json", ".JSON")
"""Suffixes of caption files; the first that exists is read."""


class FolderSource:
    """Images below a folder, sorted by name. Hidden files and folders are ignored.

    `skipped` lists images without captions and symbolic links out of the folder, which are not followed.

    If `caption_column` is given, a key of JSON, `.json` is preferred to `.txt`.

    Raises:
        ValueError: no folder, or no image with captions in it.
    """

    def __init__(self, folder: Path, caption_column: str | None = None):
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}; expected images with a .txt of the same name beside each")
        self.caption_column, self._root = caption_column, folder.resolve()
        self.skipped: list[BadSample] = []
        self._names = np.array([os.fsencode(name) for name in find_images(folder, self.skipped)], np.bytes_)
        if not len(self._names):
            raise ValueError(
                f"{folder} has {len(self.skipped)} images ({', '.join(IMAGE_SUFFIXES)}), "
                "none with a .txt of the same name"
            )
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
        suffixes = CAPTION_SUFFIXES[::-1] if self.caption_column else CAPTION_SUFFIXES
        existing = (stem + suffix for suffix in suffixes if (self._root / (stem + suffix)).is_file())
        found = next(existing, f"{stem}.txt")
        data = read_inside(self._root, found, "missing twin")
        if found.lower().endswith(".json"):
            return parse_json(data, found, self.caption_column)
        return parse_text(data, found)


def read_inside(root: Path, name: str, cause: str) -> bytes:
    """A file below a resolved folder; BadSampleError if unreadable, or outside by a link or `..`."""
    try:
        path = (root / name).resolve(strict=True)
        if path.is_relative_to(root):
            return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a cycle of links, before Python 3.13
        raise BadSampleError(name, cause, getattr(error, "strerror", None) or str(error)) from None
    raise BadSampleError(name, "leaves the folder", f"it is {path}")


def read_listed(root: Path, path: str) -> bytes:
    """The image of a path in a table. Backslashes are separators, unless a file is so named."""
    windows = "\\" in path and not os.path.lexists(os.path.join(root, path))
    return read_inside(root, path.replace("\\", "/") if windows else path, "missing twin")


def find_images(root: Path, skipped: MutableSequence[BadSample]) -> Iterator[str]:
    """Images with captions below a root, sorted by folder; others and links that lead out go to `skipped`."""
    resolved = root.resolve()
    for folder, folders, names in os.walk(root):
        files, below = [], Path(folder).relative_to(root)
        for name in sorted(name for name in folders + names if not name.startswith(".")):
            path = os.path.join(folder, name)
            if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(resolved):
                detail = f"it is {os.readlink(path)}"
                skipped.append(BadSample(None, (below / name).as_posix(), "leaves the folder", detail))
            elif os.path.isfile(path):
                files.append(name)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        existing = set(files)
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in IMAGE_SUFFIXES:
                name = (below / file).as_posix()
                if any(stem + caption in existing for caption in CAPTION_SUFFIXES):
                    yield name
                else:
                    detail = "an image without .txt or .json beside it"
                    skipped.append(BadSample(None, name, "missing twin", detail))

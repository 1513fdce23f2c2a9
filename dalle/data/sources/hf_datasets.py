"""A Hugging Face data set that lies on disk, read through the `datasets` library (memory-mapped Arrow)."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle.data.bad_samples import BadSampleError
from dalle.data.sources.captions import check_utf8, choose_columns, listed
from dalle.data.sources.image_folder import read_listed
from dalle.data.sources.names import share
from dalle.types import BadSample, RawSample

SPLITS = {"train": ("train",), "held_out": ("validation", "valid", "val", "dev")}
"""Names of the parts that people give to their sets."""


class HubSource:
    """Rows of a `datasets.Dataset` with a column of images and one or more of captions.

    Args:
        path: a folder written by `save_to_disk`, or what `load_dataset` takes.
        image_column: by name; found among the usual ones unless given.
        caption_column: by name, several with commas between; found among the usual ones unless given.
        part: "train", "held_out", or "all": the training split where there are splits.
    """

    def __init__(
        self, path: str, image_column: str | None = None, caption_column: str | None = None, part: str = "all"
    ):
        dataset = _part(load(path), part, path)
        self._image, self._captions = choose_columns(dataset.column_names, image_column, caption_column, path)
        if type(dataset.features[self._image]).__name__ == "Image":
            dataset = dataset.cast_column(self._image, _undecoded())
        self._rows = dataset.select_columns(list(dict.fromkeys([self._image, *self._captions])))
        self._texts = dataset.select_columns(self._captions)
        self._root, self.skipped = Path(path).resolve(), list[BadSample]()
        files = [
            (Path(file["filename"]).name, Path(file["filename"]).stat().st_size)
            for file in dataset.cache_files
        ]
        said = f"{len(dataset)} {self._image} {self._captions} {files}"
        self.hash = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The row."""
        return f"row {index}"

    def shares(self) -> np.ndarray:
        """uint32 (N,), a hash of each row's number."""
        return np.fromiter((share(self.name(i)) for i in range(len(self))), np.uint32, len(self))

    def read(self, index: int) -> RawSample:
        """BadSampleError, naming the sample and the cause, for one that cannot be read."""
        row, name = self._rows[index], self.name(index)
        image = row[self._image]
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            image = read_listed(self._root, image)
        if not isinstance(image, bytes):
            raise BadSampleError(name, "missing twin", "a row without an image")
        return RawSample(name, image, self._listed(row, name))

    def captions(self, index: int) -> list[str]:
        """Those of `read`, without reading the image."""
        return self._listed(self._texts[index], self.name(index))

    def _listed(self, row: Mapping[str, Any], name: str) -> list[str]:
        return check_utf8(listed([row[column] for column in self._captions]), name)


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def has_held_out(path: str) -> bool:
    """Whether the set comes with a validation part of its own."""
    dataset = load(path)
    return isinstance(dataset, dict) and any(name in dataset for name in SPLITS["held_out"])


def load(path: str) -> Any:
    """The `Dataset`, or the mapping of its splits."""
    try:
        import datasets
    except ImportError:
        raise ImportError(
            'a Hugging Face data set needs datasets: pip install "zeroshot-text2image[data]"'
        ) from None
    try:
        return datasets.load_from_disk(path) if is_saved(Path(path)) else datasets.load_dataset(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a Hugging Face data set: {error}") from None


def _part(dataset: Any, part: str, path: str) -> Any:
    if not isinstance(dataset, dict):
        return dataset
    for name in SPLITS["held_out" if part == "held_out" else "train"]:
        if name in dataset:
            return dataset[name]
    if len(dataset) == 1:
        return next(iter(dataset.values()))
    raise ValueError(
        f"{path} has the splits {', '.join(dataset)}; expected train, and validation if there is one"
    )


def _undecoded() -> Any:
    import datasets

    return datasets.Image(decode=False)

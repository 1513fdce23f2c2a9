"""Hugging Face datasets, read by the `datasets` library (memory-mapped Arrow)."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from dalle.data.bad_samples import BadSampleError
from dalle.data.sources.captions import arrow_rows, check_utf8, choose_columns, flatten_captions
from dalle.data.sources.image_folder import read_listed
from dalle.data.sources.index import name_hashes
from dalle.types import BadSample, RawSample

VAL = ("validation", "valid", "val", "dev")
"""Usual names of the validation split."""


class HubSource:
    """Rows of a `datasets.Dataset` with a column of images and one or more of captions.

    `path` is a folder written by `save_to_disk`, or an argument of `load_dataset`. Part "all" of a dataset
    with splits is its training split.
    """

    def __init__(
        self, path: str, image_column: str | None = None, caption_column: str | None = None, part: str = "all"
    ):
        dataset = load_split(path, part)
        self._image, self._captions = choose_columns(dataset.column_names, image_column, caption_column, path)
        dataset = dataset.with_format("arrow")  # decodes no image
        self._images = dataset.select_columns([self._image])
        self._texts = dataset.select_columns(self._captions)
        self._root, self.skipped = Path(path).resolve(), list[BadSample]()
        paths = [Path(file["filename"]) for file in dataset.cache_files]
        files = [(file.name, file.stat().st_size) for file in paths]
        content = f"{len(dataset)} {self._image} {self._captions} {files}"
        self.hash = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"row {index}"

    def shares(self) -> np.ndarray:
        return name_hashes(map(self.name, range(len(self))))

    def read(self, index: int) -> RawSample:
        captions, name = self.captions(index), self.name(index)
        [image] = _sound(self._images[index], name).column(self._image).to_pylist()
        return RawSample(name, read_listed(self._root, image, name), captions)

    def captions(self, index: int) -> list[str]:
        name = self.name(index)
        [row] = arrow_rows(_sound(self._texts[index], name))
        if row is None:
            raise BadSampleError(name, "caption not UTF-8")
        return check_utf8(flatten_captions([row[column] for column in self._captions]), name)


def _sound(row: Any, name: str) -> Any:
    """The Arrow table of a row; BadSampleError if its offsets lead out of the file: reading would crash."""
    try:
        row.validate(full=True)
    except ValueError as error:
        if "UTF8" not in str(error):
            raise BadSampleError(name, "unreadable shard", str(error)) from None
    return row


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def load_split(path: str, part: str) -> Any:
    """The `Dataset` of a part; "all" is the training split if there are splits. None if none is held out."""
    try:
        import datasets
    except ImportError:
        problem = "a Hugging Face dataset needs datasets"
        raise ImportError(f'{problem}: pip install "zeroshot-text2image[data]"') from None
    try:
        splits = datasets.load_from_disk(path) if is_saved(Path(path)) else datasets.load_dataset(path)
    except Exception as error:  # of a damaged folder `datasets` raises nearly anything
        reason = f"{type(error).__name__}: {error!s:.300}"
        raise ValueError(f"{path} cannot be read as a Hugging Face dataset: {reason}") from None
    if not isinstance(splits, dict):
        splits = {"train": splits}
    if part == "val":
        return next((splits[name] for name in VAL if name in splits), None)
    if "train" not in splits and len(splits) > 1:
        raise ValueError(f"{path} has the splits {', '.join(splits)}; expected train, maybe validation")
    return splits["train"] if "train" in splits else next(iter(splits.values()))

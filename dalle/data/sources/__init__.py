"""Captioned images as they lie on disk, whatever the form: one path, one way to read."""

from pathlib import Path

from dalle.data.config import Format
from dalle.data.sources import hf_datasets
from dalle.data.sources.detect import DataLocation, detect_source
from dalle.data.sources.hf_datasets import HubSource
from dalle.data.sources.image_folder import FolderSource
from dalle.data.sources.table import TableSource
from dalle.data.sources.webdataset import TarSource
from dalle.types import DataSource

__all__ = [
    "DataLocation",
    "FolderSource",
    "Format",
    "HubSource",
    "TableSource",
    "TarSource",
    "find_place",
    "has_parts",
    "open_source",
]

PARTS = ("all", "train", "held_out")


def open_source(
    path: str | Path,
    format: Format = "auto",
    image_column: str | None = None,
    caption_column: str | None = None,
    *,
    part: str = "all",
    image_root: str | Path | None = None,
    index_dir: str | Path | None = None,
) -> DataSource:
    """The captioned images at a path.

    Args:
        path: a folder of images with .txt or .json beside them, of tars, or of tables; a table; a tar; a
            pattern with *, ? and {000..099}; or a folder written by Hugging Face `datasets`.
        format: "folder", "table", "tars" or "hub" where the path does not tell.
        image_column: of a table; found among the usual names unless given.
        caption_column: of a table, or the key in JSON; several with commas between.
        part: "all", or the "train" or "held_out" part of a set that has them (see `has_val_split`).
        image_root: where the relative paths of a table start; its own folder unless given.
        index_dir: where the indexes of tars and tables lie; see `take_index`.

    Raises:
        ValueError: nothing there, nothing to read in it, or no such part; says what was expected.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}; expected one of {', '.join(PARTS)}")
    place = detect_source(str(path), format)
    if part == "held_out" and not has_val_split(str(path), format):
        raise ValueError(
            f"{path} has no part of its own for evaluation (val*.tar, a split validation); open all of it"
        )
    if place.kind == "folder":
        return FolderSource(Path(place.path), caption_column)
    if place.kind == "hub":
        return HubSource(place.path, image_column, caption_column, part)
    files = {"all": place.files, "train": place.train, "held_out": place.held_out}[part]
    folder = Path(index_dir) if index_dir else None
    if place.kind == "tars":
        return TarSource(files, caption_column, folder)
    return TableSource(files, image_column, caption_column, Path(image_root) if image_root else None, folder)


def has_val_split(path: str, format: Format = "auto") -> bool:
    """Whether a set comes with a part of its own for evaluation, as train-*.tar and val.tar."""
    place = detect_source(path, format)
    return bool(place.held_out) or (place.kind == "hub" and hf_datasets.has_held_out(place.path))

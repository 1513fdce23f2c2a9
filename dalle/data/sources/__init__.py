"""Sources of captioned images: folders, tables, WebDataset tars, Hugging Face datasets."""

from pathlib import Path

from dalle.data.config import UNUSED, Format
from dalle.data.sources.detect import detect_source
from dalle.data.sources.hf_datasets import HubSource, load_split
from dalle.data.sources.image_folder import FolderSource
from dalle.data.sources.table import TableSource
from dalle.data.sources.webdataset import TarSource
from dalle.types import BadSample, DataSource


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

    The arguments are those of `dalle.data.config.DataConfig`; `part` is "all", or the "train" or "val"
    part of a dataset that has them (`has_val_split`).

    Raises:
        ValueError: nothing there, nothing to read in it, or no such part; says what was expected.
    """
    location = detect_source(str(path), format)
    if part == "val" and not has_val_split(str(path), format):
        raise ValueError(f"{path} has no validation split of its own (val*.tar, a split validation)")
    if location.format == "folder":
        return FolderSource(Path(location.path), caption_column)
    if location.format == "hub":
        return HubSource(location.path, image_column, caption_column, part)
    files = location.val if part == "val" else location.files
    if part == "train":
        files = tuple(file for file in files if file not in location.val)
    folder = Path(index_dir) if index_dir else None
    if location.format == "tars":
        source = TarSource(files, caption_column, folder)
    else:
        root = Path(image_root) if image_root else None
        source = TableSource(files, image_column, caption_column, root, folder)
    source.skipped += [BadSample(None, file.name, UNUSED, "not read") for file in location.unused]
    return source


def has_val_split(path: str, format: Format = "auto") -> bool:
    """Whether a dataset has a validation split of its own, as train-*.tar and val.tar."""
    location = detect_source(path, format)
    if location.format == "hub":
        return load_split(location.path, "val") is not None
    return bool(location.val)

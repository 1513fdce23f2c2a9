"""Configuration of data sets and their filters (Section 2.3)."""

import re
from dataclasses import field
from pathlib import Path
from typing import Literal

from dalle.config import RESUME_FREE, configuration

Format = Literal["auto", "folder", "table", "tars", "hub"]
IMAGE_SUFFIXES = (  # what Pillow opens here, in every source; the content decides how a file is read
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jpe", ".jfif", ".pjpeg", ".pjp"),
    *(".jpg_large", ".mpo", ".apng", ".avif", ".avifs", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm"),
    *(".pnm", ".pfm", ".qoi", ".tga", ".icb", ".vda", ".vst", ".ico", ".dds", ".j2c", ".jpc", ".jpf"),
)
UNUSED = "unused file"
"""Cause of a file that is neither an image nor captions: counted and named, but no bad sample."""


@configuration
class FilterConfig:
    """Filters of Section 2.3: each drops samples and counts them; None, 0 or false switches it off."""

    boilerplate: bool = True
    """Drop captions that are only a date and the words around it ("photographed on 3 May 2009"), or a
    camera's file name (2.3)."""
    max_aspect_ratio: float | None = 2.0
    """Drop images whose longer side exceeds this multiple of the shorter (2.3: outside [1/2, 2])."""
    min_words: int = 0
    """Drop captions with fewer words (2.3, without a number)."""
    language: str | None = None
    """Drop captions in another language than this two-letter code; the paper keeps "en" (2.3). Needs
    py3langid, which errs on captions of one or two words."""
    min_size: int = 0
    """Drop images with fewer pixels on the shorter side. Training crops need the resolution in any case."""
    exclude_list: Path | None = None
    """Drop the samples named in this file, one a line; scripts/check_data.py writes one of duplicates."""

    def __post_init__(self):
        if self.max_aspect_ratio is not None and not self.max_aspect_ratio >= 1:
            raise ValueError(f"max_aspect_ratio must be at least 1, got {self.max_aspect_ratio}")
        for name in ("min_words", "min_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (off) or more, got {getattr(self, name)}")
        if self.language is not None and not re.fullmatch("[a-z]{2,3}", self.language):
            raise ValueError(f"language must be a code such as en, de or zh (or None), got {self.language!r}")


PAPER_FILTERS = FilterConfig(min_words=3, language="en")
"""All filters of Section 2.3; three words is our number where the paper has none."""


@configuration
class DataConfig:
    """Where images and captions come from, and how they are read."""

    path: str | None = None
    """Images and captions, or the word "shapes" for the embedded set. A folder of images, each with its
    captions in a .txt (one a line) or .json file of the same name; a table (.csv .tsv .jsonl .parquet) or a
    folder of them; WebDataset tars: one, a folder of them, a pattern such as "data/{000..099}.tar"; or a
    folder written by Hugging Face datasets."""
    format: Format = "auto"
    """folder, table, tars or hub, if the path does not determine it."""
    image_column: str | None = None
    """Column of a table with the images; default: the first of the usual names (image, file_name, path,
    ...)."""
    caption_column: str | None = None
    """Column of a table, or key in JSON, with the captions; several separated by commas."""
    image_root: str | None = None
    """Folder that a table's relative paths start from; default: the table's own."""
    resolution: int = 256
    """Image side in pixels (2.1)."""
    val_fraction: float = 0.05
    """Fraction of the images for validation, chosen by name; a set with its own validation split (files named
    val*, a split "validation") keeps that split instead."""
    val_path: str | None = None
    """Images for validation in another place; then all of `path` is trained on."""
    filters: FilterConfig = FilterConfig()
    """Which samples are dropped (2.3)."""
    jpeg_draft: bool = False
    """Decode large JPEGs at a half, a quarter or an eighth, never below twice the resolution, before
    cropping: nearly twice as fast, but not the exact pixels of the paper's listings (docs/paper.md)."""
    max_bad_fraction: float = field(default=0.01, metadata=RESUME_FREE)
    """Fraction of bad samples above which a run ends, once there are more than a hundred."""
    workers: int = field(default=-1, metadata=RESUME_FREE)
    """Dataloader processes; 0 loads in the training process, -1 uses one for each core but one, eight at
    most, and none for the shapes. The batches are the same for any number."""
    prefetch: int = field(default=2, metadata=RESUME_FREE)
    """Batches that each worker keeps ready."""
    index_dir: str | None = field(default=None, metadata=RESUME_FREE)
    """Folder for indexes of tars and tables; default: a hidden folder next to the data, or ~/.cache/dalle."""
    shapes_seed: int = 0
    """Seed of the shapes data set."""

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.val_fraction}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}")
        if self.workers < -1:
            raise ValueError(f"workers must be -1 (one for each core but one), 0 or more, got {self.workers}")
        if self.prefetch < 1:
            raise ValueError(f"prefetch must be positive, got {self.prefetch}")

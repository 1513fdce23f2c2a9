"""Datasets of captioned images by index: the embedded shapes, or the images of a source."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from dalle.data.bad_samples import BadSampleError, check_bad_fraction, examples_text
from dalle.data.config import UNUSED, DataConfig, FilterConfig
from dalle.data.filters import Filters
from dalle.data.image_decode import decode, open_image
from dalle.data.sampler import FeistelPermutation, epoch_stream
from dalle.data.sources import has_val_split, open_source
from dalle.data.transforms import transform
from dalle.sampling import generator
from dalle.shapes.dataset import ShapesDataset
from dalle.types import BadSample, CaptionedImages, DataSource, ImageTextBatch

TRIES = 1000
"""Candidates tried in place of a bad sample."""


def open_dataset(config: DataConfig, split: str = "train", siblings: bool = False) -> CaptionedImages:
    """A split of a dataset: "train" or "val"; of the shapes also "new_pairs".

    With `siblings` every second image of the shapes differs from the one before in one attribute. ValueError
    if there are no data, or too many bad samples found while opening.
    """
    if config.path is None:
        raise ValueError("no data: give --data.path FOLDER, or --data.path shapes for the embedded set")
    if config.path == "shapes":
        return ShapesDataset(config.resolution, config.shapes_seed, split, siblings)
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}; expected train or val")
    path, part, val_fraction = config.path, "all", config.val_fraction
    if config.val_path is not None and split == "val":
        path, val_fraction = config.val_path, None
    elif has_val_split(config.path, config.format):
        part, val_fraction = split, None
    elif config.val_path is not None:
        val_fraction = None
    source = source_of(config, path, part)
    if (split == "train" or val_fraction is None) and not int(os.environ.get("RANK", 0)):
        note_left_out(path, source)
    bad = sum(bad.cause != UNUSED for bad in source.skipped)
    check_bad_fraction(bad, len(source) + bad, config.max_bad_fraction, examples_text(source.skipped))
    filters = Filters(config.filters)
    return ImageTextDataset(source, config.resolution, split, val_fraction, filters, config.jpeg_draft)


def source_of(config: DataConfig, path: str, part: str = "all") -> DataSource:
    """The captioned images at a path, read as configured."""
    names = ("format", "image_column", "caption_column", "image_root", "index_dir")
    return open_source(path, part=part, **{name: getattr(config, name) for name in names})


def note_left_out(path: str, source: DataSource) -> None:
    """Prints what opening a source left out, by cause."""
    if source.skipped:
        tqdm.write(f"note: of {path}, left out {examples_text(source.skipped)}")


class ImageTextDataset:
    """The images of a source, or of a split of it, as `CaptionedImages`.

    The fraction `val_fraction` is chosen by name; None takes the whole source. With `draft` large JPEGs are
    decoded at a smaller size before a random crop.
    """

    def __init__(
        self,
        source: DataSource,
        resolution: int,
        split: str = "train",
        val_fraction: float | None = None,
        filters: Filters | None = None,
        draft: bool = False,
    ):
        self.source, self.resolution, self.draft = source, resolution, draft
        self.skipped: Sequence[BadSample] = source.skipped
        self._filters = filters or Filters(FilterConfig())
        self._indices: Sequence[int] | np.ndarray = range(len(source))
        part = "whole"
        if val_fraction is not None:
            chosen = (source.shares() < val_fraction * 2**32) == (split == "val")
            self._indices = np.flatnonzero(chosen).astype(np.uint32 if len(source) < 2**32 else np.uint64)
            part = f"{split} {val_fraction}"
            if not len(self._indices):
                raise ValueError(f"none of {len(source)} samples is in {split!r}; raise --data.val-fraction")
        self.size = len(self._indices)
        self.hash = hashlib.blake2b(f"{source.hash} {part}".encode(), digest_size=8).hexdigest()

    def name(self, index: int) -> str:
        return self.source.name(int(self._indices[index]))

    def captions(self, indices: Sequence[int]) -> list[list[str]]:
        lists = []
        for index in indices:
            try:
                lists.append(self._filters.captions(self.source.captions(int(self._indices[index]))))
            except BadSampleError:
                lists.append([])
        return lists

    def load(
        self, samples: Sequence[tuple[int, int]], augment: str = "none", seed: int = 0, replace: bool = False
    ) -> ImageTextBatch:
        """See `CaptionedImages`; ValueError if no sample among many can replace a bad one."""
        batch = ImageTextBatch(np.zeros((0, 3, self.resolution, self.resolution), np.float32), [], [])
        images = []
        for epoch, index in samples:
            for candidate in self._candidates(seed, epoch, index) if replace else [index]:
                try:
                    image, captions = self._read(candidate, augment, epoch_stream(seed, epoch))
                except BadSampleError as error:
                    batch.skipped.append(error.skip(candidate))
                    continue
                images.append(image)
                batch.captions.append(captions)
                batch.samples.append((epoch, candidate))
                break
            else:
                if replace:
                    tried = batch.skipped[-min(TRIES, self.size) :]
                    raise ValueError(f"no usable sample among {len(tried)} tried: {examples_text(tried)}")
        if images:
            batch.pixels = np.stack(images).transpose(0, 3, 1, 2) / np.float32(255)
        return batch

    def _candidates(self, seed: int, epoch: int, index: int) -> Iterator[int]:
        """The sample, then others in a random order of its own, so that a bad range is spread over all."""
        yield index
        order = FeistelPermutation(self.size, "replacement", seed, epoch, index)
        others = order(np.arange(min(TRIES, self.size))).tolist()
        yield from (other for other in others if other != index)

    def _read(self, index: int, augment: str, stream: int) -> tuple[np.ndarray, list[str]]:
        """Pixels (R, R, 3) in [0, 255] and captions; BadSampleError if the sample cannot be used."""
        sample = self.source.read(int(self._indices[index]))
        name = sample.name
        if not any(caption.strip() for caption in sample.captions):
            raise BadSampleError(name, "empty caption")
        image = open_image(sample.image, name)
        if reason := self._filters.reason(sample.captions, *image.size, name=name):
            raise BadSampleError(name, f"filter:{reason}")
        image = decode(image, name, 2 * self.resolution if self.draft and augment != "none" else None)
        try:
            image = transform(image, self.resolution, augment, generator("crop", stream, index))
        except ValueError as error:
            raise BadSampleError(name, "too small", str(error)) from None
        return np.asarray(image, np.float32), self._filters.captions(sample.captions)


def first_samples(dataset: CaptionedImages, count: int) -> ImageTextBatch:
    """The first usable samples, `count` at most, without augmentation; prints what was left out."""
    size = dataset.size or sys.maxsize
    end = min(count, size)
    found = dataset.load([(0, index) for index in range(end)])
    while len(found.samples) < count and end < size:
        start, end = end, min(end + count - len(found.samples), size)
        more = dataset.load([(0, index) for index in range(start, end)])
        found.pixels = np.concatenate([found.pixels, more.pixels])
        found.captions += more.captions
        found.samples += more.samples
        found.skipped += more.skipped
    if not found.samples:
        raise ValueError(f"no usable sample to evaluate on: {examples_text(found.skipped)}")
    if found.skipped:
        tqdm.write(f"note: of the samples to evaluate on, left out {examples_text(found.skipped)}")
    return found


def sample_captions(batch: ImageTextBatch, seed: int) -> list[str]:
    """One random caption of each image, which depends on (seed, epoch, index) alone."""
    return [
        captions[generator("caption", seed, epoch, index).integers(len(captions))]
        for (epoch, index), captions in zip(batch.samples, batch.captions, strict=True)
    ]

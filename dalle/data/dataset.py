"""Captioned images by number: the embedded shapes, or the images of any source.

B batch, R resolution
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dalle.data.bad_samples import BadSampleError, check_bad_fraction, count_causes
from dalle.data.config import DataConfig, FilterConfig
from dalle.data.filters import Filters
from dalle.data.image_decode import decode, open_image
from dalle.data.sampler import FeistelPermutation
from dalle.data.sources import has_val_split, open_source
from dalle.data.transforms import transform
from dalle.io.rng import epoch_stream, generator
from dalle.shapes.dataset import ShapesDataset
from dalle.types import BadSample, CaptionedImages, DataSource, ImageTextBatch, RawSample

TRIES = 1000
"""Samples tried in place of one that cannot be used."""


def open_dataset(config: DataConfig, split: str = "train", siblings: bool = False) -> CaptionedImages:
    """The pairs of a split, "train" or "held_out" ("new_pairs" too for shapes).

    Args:
        config: which set.
        split: which part.
        siblings: for shapes, every second image differs from the one before in one attribute.

    Raises:
        ValueError: no data, or too much of it is found to be broken while opening.
    """
    if config.path is None:
        raise ValueError("no data: give --data.path FOLDER, or --data.path shapes for the embedded set")
    if config.path == "shapes":
        return ShapesDataset(config.resolution, config.shapes_seed, split, siblings)
    if split not in ("train", "held_out"):
        raise ValueError(f"unknown split {split!r}; expected train or held_out")
    path, part, held_out = config.path, "all", config.val_fraction
    if config.val_path is not None and split == "held_out":
        path, held_out = config.val_path, None
    elif has_val_split(config.path, config.format):
        part, held_out = split, None
    elif config.val_path is not None:
        held_out = None
    source = open_source(
        path,
        config.format,
        config.image_column,
        config.caption_column,
        part=part,
        image_root=config.image_root,
        index_dir=config.index_dir,
    )
    check_bad_fraction(
        len(source.skipped),
        len(source) + len(source.skipped),
        config.max_bad_fraction,
        _examples(source.skipped),
    )
    return ImageTextDataset(
        source, config.resolution, split, held_out, Filters(config.filters), config.jpeg_draft
    )


def load_images(
    pairs: CaptionedImages, samples: Sequence[tuple[int, int]], augment: str, seed: int
) -> Tensor:
    """Pixels (B, 3, R, R) of (epoch, index) samples; a crop depends on (seed, epoch, index) alone."""
    return torch.from_numpy(pairs.load(samples, augment, seed, replace=True).pixels)


class ImageTextDataset:
    """The images of a source, or of a part of it, by number.

    Args:
        source: all of them.
        resolution: pixels on a side.
        split: "train" or "held_out".
        held_out: the share that is held out, chosen by name; None takes the whole source.
        filters: what else is left out.
        draft: decode large JPEGs smaller before a random crop.

    Raises:
        ValueError: no sample falls into the split.
    """

    def __init__(
        self,
        source: DataSource,
        resolution: int,
        split: str = "train",
        held_out: float | None = None,
        filters: Filters | None = None,
        draft: bool = False,
    ):
        self.source, self.resolution, self.draft = source, resolution, draft
        self.skipped: Sequence[BadSample] = source.skipped
        self._filters = filters or Filters(FilterConfig())
        self._numbers: np.ndarray | None = None
        if held_out is not None:
            chosen = (source.shares() < held_out * 2**32) == (split == "held_out")
            dtype = np.uint32 if len(source) < 2**32 else np.uint64
            self._numbers = np.flatnonzero(chosen).astype(dtype)
            if not len(self._numbers):
                raise ValueError(
                    f"none of {len(source)} pairs falls into split {split!r}; raise --data.val-fraction"
                )
        self.size = len(source) if self._numbers is None else len(self._numbers)
        part = f"{split} {held_out}" if held_out is not None else "whole"
        self.hash = hashlib.blake2b(f"{source.hash} {part}".encode(), digest_size=8).hexdigest()

    def name(self, index: int) -> str:
        """Names an image for people."""
        return self.source.name(self._number(index))

    def captions(self, indices: Sequence[int]) -> list[list[str]]:
        """Every caption of each image, read without the images; none for one that cannot be used."""
        return [self._captions_or_none(index) for index in indices]

    def _captions_or_none(self, index: int) -> list[str]:
        try:
            return self._filters.captions(self.source.captions(self._number(index)))
        except BadSampleError:
            return []

    def load(
        self, samples: Sequence[tuple[int, int]], augment: str = "none", seed: int = 0, replace: bool = False
    ) -> ImageTextBatch:
        """The images of (epoch, index) samples; a random crop depends on (seed, epoch, index) alone.

        Args:
            samples: which.
            augment: the listing that crops, or "none" for the middle.
            seed: of the crops.
            replace: in place of one that cannot be used take another, drawn from (seed, epoch, index).

        Raises:
            ValueError: nothing usable among many tried.
        """
        batch = ImageTextBatch(np.zeros((0, 3, self.resolution, self.resolution), np.float32), [], [])
        images = []
        for epoch, index in samples:
            for candidate in self._candidates(seed, epoch, index) if replace else [index]:
                try:
                    image, captions = self._sample(candidate, augment, epoch_stream(seed, epoch))
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
                    raise ValueError(f"no usable sample among {len(tried)} tried: {_examples(tried)}")
        if images:
            batch.pixels = np.stack(images).transpose(0, 3, 1, 2) / np.float32(255)
        return batch

    def _candidates(self, seed: int, epoch: int, index: int) -> Iterator[int]:
        """The sample itself, then others in an order of its own: any broken stretch is spread over the whole set."""
        yield index
        others = FeistelPermutation(self.size, "replacement", seed, epoch, index)
        for place in range(min(TRIES, self.size)):
            other = int(others(np.array([place]))[0])
            if other != index:
                yield other

    def _sample(self, index: int, augment: str, stream: int) -> tuple[np.ndarray, list[str]]:
        """Values (R, R, 3) in [0, 255] and captions; BadSampleError says why not."""
        record = self._read(index)
        image = open_image(record.image, record.name)
        if reason := self._filters.reason(record.captions, *image.size, name=record.name):
            raise BadSampleError(record.name, f"filter:{reason}")
        captions = self._filters.captions(record.captions)
        rgb = decode(image, record.name, 2 * self.resolution if self.draft and augment != "none" else None)
        return self._crop(rgb, record.name, augment, generator("crop", stream, index)), captions

    def _read(self, index: int) -> RawSample:
        record = self.source.read(self._number(index))
        if not any(caption.strip() for caption in record.captions):
            raise BadSampleError(record.name, "empty caption")
        return record

    def _crop(self, image: Image.Image, name: str, augment: str, rng: np.random.Generator) -> np.ndarray:
        try:
            return np.asarray(transform(image, self.resolution, augment, rng), np.float32)
        except ValueError as error:
            raise BadSampleError(name, "too small", str(error)) from None

    def _number(self, index: int) -> int:
        return index if self._numbers is None else int(self._numbers[index])


def first_samples(pairs: CaptionedImages, count: int) -> ImageTextBatch:
    """The first usable pairs, `count` at most, without augmentation; a note tells what was left out."""
    at, parts = 0, []
    found, skipped = 0, []
    while found < count and (pairs.size is None or at < pairs.size):
        end = at + count - found if pairs.size is None else min(at + count - found, pairs.size)
        parts.append(pairs.load([(0, index) for index in range(at, end)]))
        found += len(parts[-1].samples)
        skipped += parts[-1].skipped
        at = end
    if not found:
        raise ValueError(f"no usable sample to evaluate on: {_examples(skipped)}")
    if skipped:
        tqdm.write(f"note: of the pairs to evaluate on, left out {_examples(skipped)}")
    return ImageTextBatch(
        np.concatenate([part.pixels for part in parts]),
        [captions for part in parts for captions in part.captions],
        [sample for part in parts for sample in part.samples],
        skipped,
    )


def sample_captions(batch: ImageTextBatch, seed: int) -> list[str]:
    """One caption of each image; which depends on (seed, epoch, index) alone."""
    drawn = []
    for (epoch, index), captions in zip(batch.samples, batch.captions, strict=True):
        drawn.append(captions[generator("caption", seed, epoch, index).integers(len(captions))])
    return drawn


def _examples(skips: Sequence[BadSample]) -> str:
    named = ", ".join(
        f"{skip.name} ({skip.cause}{', ' * bool(skip.detail)}{skip.detail})" for skip in skips[:3]
    )
    return f"{count_causes(skips)}; for example {named}" if skips else ""

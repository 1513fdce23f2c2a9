"""Statistics of a dataset: image sizes, caption lengths, what filters drop, duplicates.

Workers scan chunks of CHUNK samples, and the parts add up in order, so the result is the same for any number
of workers. Memory grows by 16 bytes a sample.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dalle.data.bad_samples import BadSampleError
from dalle.data.config import FilterConfig
from dalle.data.dataloader import Loader
from dalle.data.dedup import find_copies, image_hash, near_duplicate_groups, thumbnail
from dalle.data.filters import Filters, count_words, one_by_one
from dalle.data.image_decode import decode, open_image
from dalle.types import BadSample, DataSource, TextTokenizerLike

CHUNK = 32
"""Samples that a worker scans at a time."""
EXAMPLES = 5
"""Examples kept of what each filter drops."""
TILE = 128
"""Side of an image on the contact sheet, in pixels."""


@dataclass
class DatasetStats:
    """Statistics of a part of a dataset. Sizes, words and tokens are those of usable samples."""

    shorter_side: Counter[int] = field(default_factory=Counter)
    aspect: Counter[str] = field(default_factory=Counter)
    """Images by pixels and by shape, upright."""
    words: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    """Captions by number of words and of tokens."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Samples that each filter alone would drop."""
    dropped_by_any: int = 0
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The first samples that each filter would drop."""
    indices: array = field(default_factory=lambda: array("Q"))
    hashes: array = field(default_factory=lambda: array("Q"))
    """Usable samples, and perceptual hashes of their images."""
    skipped: list[BadSample] = field(default_factory=list)
    """Bad samples; not added up, since a dataset may hold any number of them."""
    tiles: list[tuple[str, Image.Image]] = field(default_factory=list)
    """(caption, small image) of the samples on the contact sheet."""

    def add(self, other: "DatasetStats") -> None:
        """Adds the statistics of the next part, except `skipped`."""
        for name in ("shorter_side", "aspect", "words", "tokens", "dropped"):
            getattr(self, name).update(getattr(other, name))
        for name in ("indices", "hashes", "tiles"):
            getattr(self, name).extend(getattr(other, name))
        self.dropped_by_any += other.dropped_by_any
        for name, more in other.examples.items():
            self.examples[name] = [*self.examples.get(name, []), *more][:EXAMPLES]


class DatasetScanner:
    """Chunk number -> statistics of its samples, for the workers.

    Args:
        source: any.
        filters: tried one by one and together on the usable samples.
        text: counts tokens.
        tiles: indices of the samples on the contact sheet.

    Raises:
        ValueError, ImportError: a filter cannot be set up.
    """

    def __init__(
        self,
        source: DataSource,
        filters: FilterConfig,
        text: TextTokenizerLike | None = None,
        tiles: Collection[int] = (),
    ):
        self.source, self.text, self.tiles = source, text, frozenset(tiles)
        self.filters = {name: Filters(config) for name, config in one_by_one(filters).items()}
        self._all_filters = Filters(filters)

    def scan(self, workers: int = 0) -> Iterator[DatasetStats]:
        """The statistics of each chunk in order."""
        return _map(self, -(-len(self.source) // CHUNK), workers)

    def __call__(self, chunk: int) -> DatasetStats:
        stats = DatasetStats()
        for index in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.source))):
            try:
                self._scan_one(index, stats)
            except BadSampleError as error:
                stats.skipped.append(error.skip(index))
        return stats

    def _scan_one(self, index: int, stats: DatasetStats) -> None:
        sample = self.source.read(index)
        if not any(caption.strip() for caption in sample.captions):
            raise BadSampleError(sample.name, "empty caption")
        image = decode(open_image(sample.image, sample.name), sample.name)
        stats.indices.append(index)
        stats.hashes.append(image_hash(image))
        stats.shorter_side[min(image.size)] += 1
        stats.aspect[aspect(image.size)] += 1
        stats.words.update(map(count_words, sample.captions))
        if self.text:
            stats.tokens.update(len(self.text.encode(caption)) for caption in sample.captions)
        if index in self.tiles:
            tile = ImageOps.pad(image, (TILE, TILE), color="lightgray")
            stats.tiles.append((sample.captions[0], tile))

        def drops(filters: Filters) -> bool:
            return filters.reason(sample.captions, *image.size, name=sample.name) is not None

        dropping = [name for name, filters in self.filters.items() if drops(filters)]
        stats.dropped.update(dropping)
        example = {"name": sample.name, "size": list(image.size), "captions": sample.captions[:EXAMPLES]}
        for name in dropping:
            stats.examples.setdefault(name, []).append(example)
        # several captions may each fall to another filter
        stats.dropped_by_any += bool(dropping) or (len(sample.captions) > 1 and drops(self._all_filters))


def _map(task: Callable[[int], Any], steps: int, workers: int) -> Iterator[Any]:
    with Loader(task, steps, workers) as load:
        yield from map(load, range(steps))


def summarize(counts: Counter[int]) -> dict[str, Any]:
    """Mean and percentiles of numbers by their counts; {} for none."""
    if not counts:
        return {}
    values = np.array(sorted(counts))
    numbers = np.array([counts[value] for value in values.tolist()])
    cumulative = numbers.cumsum()
    ranks = np.array([0, 5, 50, 95, 100]) / 100 * cumulative[-1]
    percentiles = values[np.searchsorted(cumulative, np.maximum(ranks, 1))].tolist()
    names = ("min", "p5", "median", "p95", "max")
    mean = round(float(values @ numbers / cumulative[-1]), 2)
    return dict(zip(names, percentiles, strict=True)) | {"mean": mean}


def aspect(size: tuple[int, int]) -> str:
    """The shape of an image of (width, height): "square", "wide, up to 4:3", "tall, beyond 2:1"."""
    longer, shorter = max(size), min(size)
    if longer == shorter:
        return "square"
    limit = "beyond 2:1"
    if 3 * longer <= 4 * shorter:
        limit = "up to 4:3"
    elif longer <= 2 * shorter:
        limit = "up to 2:1"
    return f"{'wide' if size[0] > size[1] else 'tall'}, {limit}"


def _thumbnails(source: DataSource, indices: Sequence[int], chunk: int) -> list[np.ndarray]:
    """The thumbnails of a chunk of `indices`."""
    indices = indices[chunk * CHUNK : (chunk + 1) * CHUNK]
    samples = map(source.read, indices)
    return [thumbnail(decode(open_image(sample.image, sample.name), sample.name)) for sample in samples]


def find_duplicates(source: DataSource, stats: DatasetStats, workers: int = 0) -> Iterator[tuple[int, int]]:
    """(index of a copy, index of the first sample with the same image).

    Images whose hashes have near neighbors are read a second time, a group in memory at once.
    """
    groups = near_duplicate_groups(np.array(stats.hashes, dtype=np.uint64))
    indices = [stats.indices[i] for group in groups for i in group]
    chunks = _map(partial(_thumbnails, source, indices), -(-len(indices) // CHUNK), workers)
    images = chain.from_iterable(chunks)
    for group in groups:
        firsts = find_copies(list(islice(images, len(group))))
        for i, first in zip(group, firsts, strict=True):
            if first is not None:
                yield stats.indices[i], stats.indices[group[first]]

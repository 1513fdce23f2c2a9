"""Statistics of a dataset: image sizes, caption lengths, what filters drop, duplicates.

Workers scan chunks of CHUNK samples, and the parts add up in order, so the result is the same for any number
of workers. Memory grows by 16 bytes a sample.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

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

    counts: dict[str, Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))
    """Images by "shorter_side" and "aspect" (width / height), captions by number of "words" and "tokens", and
    samples "dropped" by each filter alone, under its name, and by "all" together."""
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
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
        for name, more in other.counts.items():
            self.counts[name].update(more)
        for name in ("indices", "hashes", "tiles"):
            getattr(self, name).extend(getattr(other, name))
        for name, more in other.examples.items():
            self.examples[name] = [*self.examples[name], *more][:EXAMPLES]


class DatasetScanner:
    """Chunk number -> statistics of its samples, for the workers.

    `filters` are tried one by one and together on the usable samples, `text` counts tokens, and `tiles` are
    the indices of the samples on the contact sheet.
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
        stats.counts["shorter_side"][min(image.size)] += 1
        stats.counts["aspect"][round(image.width / image.height, 2)] += 1
        stats.counts["words"].update(map(count_words, sample.captions))
        if self.text:
            stats.counts["tokens"].update(len(self.text.encode(caption)) for caption in sample.captions)
        if index in self.tiles and max(image.size) < TILE * min(image.size):  # no room for a sliver
            tile = ImageOps.pad(image, (TILE, TILE), color="lightgray")
            stats.tiles.append((sample.captions[0], tile))

        def drops(filters: Filters) -> bool:
            return filters.reason(sample.captions, *image.size, name=sample.name) is not None

        dropping = [name for name, filters in self.filters.items() if drops(filters)]
        example = {"name": sample.name, "size": list(image.size), "captions": sample.captions[:EXAMPLES]}
        for name in dropping:
            stats.examples[name].append(example)
        # several captions may each fall to another filter
        if dropping or (len(sample.captions) > 1 and drops(self._all_filters)):
            dropping.append("all")
        stats.counts["dropped"].update(dropping)


def _map(task: Callable[[int], Any], steps: int, workers: int) -> Iterator[Any]:
    with Loader(task, steps, workers) as load:
        yield from map(load, range(steps))


def summarize(counts: Counter[float]) -> dict[str, Any]:
    """Mean and percentiles of numbers by their counts; {} for none."""
    if not counts:
        return {}
    values, numbers = np.array(list(counts.keys())), np.array(list(counts.values()))
    percentiles = np.percentile(values, [0, 5, 50, 95, 100], weights=numbers, method="inverted_cdf").tolist()
    mean = round(float(np.average(values, weights=numbers)), 2)
    return dict(zip(("min", "p5", "median", "p95", "max"), percentiles, strict=True), mean=mean)


def _thumbnails(source: DataSource, indices: Sequence[int], chunk: int) -> list[np.ndarray | None]:
    """The thumbnails of a chunk of `indices`; None for an image that cannot be read a second time."""
    thumbnails: list[np.ndarray | None] = []
    for index in indices[chunk * CHUNK : (chunk + 1) * CHUNK]:
        try:
            sample = source.read(index)
            thumbnails.append(thumbnail(decode(open_image(sample.image, sample.name), sample.name)))
        except BadSampleError as error:
            tqdm.write(f"note: it has changed since it was read first: {error}")
            thumbnails.append(None)
    return thumbnails


def find_duplicates(source: DataSource, stats: DatasetStats, workers: int = 0) -> Iterator[tuple[int, int]]:
    """(index of a copy, index of the first sample with the same image).

    Images whose hashes have near neighbors are read a second time, a group in memory at once.
    """
    groups = near_duplicate_groups(np.array(stats.hashes, dtype=np.uint64))
    indices = [stats.indices[i] for group in groups for i in group]
    chunks = _map(partial(_thumbnails, source, indices), -(-len(indices) // CHUNK), workers)
    images = chain.from_iterable(chunks)
    for group in groups:
        found = list(islice(images, len(group)))
        group = [i for i, image in zip(group, found, strict=True) if image is not None]
        firsts = find_copies([image for image in found if image is not None])
        for i, first in zip(group, firsts, strict=True):
            if first is not None:
                yield stats.indices[i], stats.indices[group[first]]

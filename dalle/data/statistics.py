"""One look at every sample of a source, by workers: what scripts/check_data.py counts.

A worker is given the number of a stretch of STRETCH samples and gives its findings, which add up in the order of the
stretches; so the sum is the same for any number of workers. What grows with the set is 16 bytes a sample.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dalle.data.bad_samples import BadSampleError
from dalle.data.config import FilterConfig
from dalle.data.dataloader import Loader
from dalle.data.dedup import alike, copies, image_hash, small_copy
from dalle.data.filters import Filters, count_words, one_by_one
from dalle.data.image_decode import decode, open_image
from dalle.types import BadSample, DataSource, RawSample, TextTokenizerLike

STRETCH = 32
"""Samples that a worker reads at a time."""
EXAMPLES = 5
"""Kept of what each filter drops."""
TILE = 128
"""Pixels on a side of an image on a sheet."""


@dataclass
class DatasetStats:
    """What was found in some samples. Sizes, words and tokens are of those that can be used."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Images by (width, height), upright."""
    words: Counter[int] = field(default_factory=Counter)
    """Captions by number of words."""
    tokens: Counter[int] = field(default_factory=Counter)
    """Captions by number of tokens."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Samples that each filter alone would drop."""
    left_out: int = 0
    """Samples that all filters together would drop."""
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The first few samples that each filter would drop."""
    numbers: array = field(default_factory=lambda: array("Q"))
    """Of the samples that can be used."""
    hashes: array = field(default_factory=lambda: array("Q"))
    """Of their images."""
    skipped: list[BadSample] = field(default_factory=list)
    """Those that cannot."""
    tiles: list[tuple[str, Image.Image]] = field(default_factory=list)
    """A caption and a small image of each sample asked for."""

    def add(self, other: "DatasetStats") -> None:
        """Takes in those of the next stretch, but for `skipped`: a set may hold any number of them."""
        for name in ("sizes", "words", "tokens", "dropped"):
            getattr(self, name).update(getattr(other, name))
        for name in ("numbers", "hashes", "tiles"):
            getattr(self, name).extend(getattr(other, name))
        self.left_out += other.left_out
        for name, more in other.examples.items():
            self.examples[name] = [*self.examples.get(name, []), *more][:EXAMPLES]


class DatasetScanner:
    """What a worker does: the findings of stretch after stretch of a source.

    Args:
        source: any.
        filters: to be tried one by one and together, on the samples that can be used.
        text: counts tokens.
        tiles: numbers of the samples whose small images are wanted.

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
        self._each = {name: Filters(config) for name, config in one_by_one(filters).items()}
        self._all = Filters(filters)
        self.filters = list(self._each)

    def __call__(self, stretch: int) -> DatasetStats:
        found = DatasetStats()
        for number in range(stretch * STRETCH, min((stretch + 1) * STRETCH, len(self.source))):
            try:
                self._look(number, found)
            except BadSampleError as error:
                found.skipped.append(error.skip(number))
        return found

    def _look(self, number: int, found: DatasetStats) -> None:
        record = self.source.read(number)
        if not any(caption.strip() for caption in record.captions):
            raise BadSampleError(record.name, "empty caption")
        image = decoded(record)
        found.numbers.append(number)
        found.hashes.append(image_hash(image))
        found.sizes[image.size] += 1
        found.words.update(map(count_words, record.captions))
        if self.text:
            found.tokens.update(len(self.text.encode(caption)) for caption in record.captions)
        self._try_filters(record, image.size, found)
        if number in self.tiles:
            found.tiles.append((record.captions[0], tile(image)))

    def _try_filters(self, record: RawSample, size: tuple[int, int], found: DatasetStats) -> None:
        def drops(filters: Filters) -> bool:
            return filters.reason(record.captions, *size, name=record.name) is not None

        dropping = [name for name, filters in self._each.items() if drops(filters)]
        found.dropped.update(dropping)
        for name in dropping:
            examples = found.examples.setdefault(name, [])
            if len(examples) < EXAMPLES:
                examples.append(
                    {"name": record.name, "size": list(size), "captions": record.captions[:EXAMPLES]}
                )
        # Of several captions each may fall to another filter.
        found.left_out += bool(dropping) or (len(record.captions) > 1 and drops(self._all))


def decoded(record: RawSample) -> Image.Image:
    """The whole image of a record, RGB and upright; BadSampleError says why not."""
    return decode(open_image(record.image, record.name), record.name)


def tile(image: Image.Image) -> Image.Image:
    """All of an image within TILE x TILE, the rest grey."""
    return ImageOps.pad(image, (TILE, TILE), color="lightgrey")


def examine(examiner: DatasetScanner, workers: int = 0) -> Iterator[DatasetStats]:
    """The findings of each stretch, read ahead by `workers` processes or in this one."""
    yield from _each(examiner, -(-len(examiner.source) // STRETCH), workers)


def _each(task: Callable[[int], Any], steps: int, workers: int) -> Iterator[Any]:
    with Loader(task, steps, workers) as load:
        yield from map(load, range(steps))


# ---------------------------------------------------------------------------------------------
# Duplicates
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmallCopies:
    """What a worker does: small copies of the samples of a stretch of `numbers`."""

    source: DataSource
    """Any."""
    numbers: Sequence[int]
    """Of the samples."""

    def __call__(self, stretch: int) -> list[np.ndarray]:
        numbers = self.numbers[stretch * STRETCH : (stretch + 1) * STRETCH]
        return [small_copy(decoded(self.source.read(number))) for number in numbers]


def find_duplicates(source: DataSource, found: DatasetStats, workers: int = 0) -> Iterator[tuple[int, int]]:
    """(number of a copy, number of the first that shows the same image), by `alike`, then by `copies`.

    The images of which others have nearly the same hash are read a second time, no more than a group in memory.
    """
    groups = alike(np.array(found.hashes, dtype=np.uint64))
    numbers = [found.numbers[place] for group in groups for place in group]
    task = SmallCopies(source, numbers)
    images = chain.from_iterable(_each(task, -(-len(numbers) // STRETCH), workers))
    for group in groups:
        firsts = copies(list(islice(images, len(group))))
        for place, first in zip(group, firsts, strict=True):
            if first is not None:
                yield found.numbers[place], found.numbers[group[first]]

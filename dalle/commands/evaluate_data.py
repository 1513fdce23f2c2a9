"""Held-out pairs, read a batch at a time: as many as asked for, in the order of the set."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.config import to_dict
from dalle.data import DataConfig, open_dataset, sample_captions
from dalle.types import ImageTextBatch


class HeldOut:
    """The first usable held-out pairs of a set.

    Args:
        data: which set.
        resolution: pixels on a side.
        count: pairs at most.
        batch: pairs read at once.
        seed: which caption of a pair is drawn where one is asked for.

    Raises:
        ValueError: no such set.
    """

    def __init__(self, data: DataConfig, resolution: int, count: int, batch: int, seed: int):
        self.data, self.count, self.batch, self.seed = (
            replace(data, resolution=resolution),
            count,
            batch,
            seed,
        )
        self.pairs = open_dataset(self.data, "held_out")

    def batches(self, count: int | None = None) -> Iterator[ImageTextBatch]:
        """The first `count` pairs that can be used, all of `self.count` unless given; ValueError where none can."""
        at, found, count = 0, 0, count or self.count
        while found < count and (self.pairs.size is None or at < self.pairs.size):
            end = at + min(self.batch, count - found)
            end = end if self.pairs.size is None else min(end, self.pairs.size)
            part = self.pairs.load([(0, index) for index in range(at, end)])
            at, found = end, found + len(part.samples)
            if part.samples:
                yield part
        if not found:
            raise ValueError(
                f"no held-out pair of {self.data.path} can be used; scripts/check_data.py says why"
            )

    def prompts(self, count: int) -> list[str]:
        """One caption of each of the first pairs."""
        return [caption for batch in self.batches(count) for caption in sample_captions(batch, self.seed)]

    def labelled(self, classes: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels (B, 3, R, R) and classes int64 (B,) of the pairs whose caption is the name of a class.

        Raises:
            ValueError: there is none.
        """
        numbers, found = {_plain(name): i for i, name in enumerate(classes)}, 0
        for batch in self.batches():
            labels = [
                next((numbers[c] for c in map(_plain, texts) if c in numbers), -1) for texts in batch.captions
            ]
            chosen = [i for i, label in enumerate(labels) if label >= 0]
            found += len(chosen)
            if chosen:
                yield torch.from_numpy(batch.pixels[chosen]), torch.tensor([labels[i] for i in chosen])
        if not found:
            raise ValueError(
                f"no held-out caption of {self.data.path} is the name of a class, as {classes[0]!r}; "
                "classes are for images whose caption is their class"
            )

    def facts(self) -> dict[str, Any]:
        """What names the images."""
        return {
            "path": self.data.path,
            "hash": self.pairs.hash,
            "pairs_at_most": self.count,
            "resolution": self.data.resolution,
            "filters": to_dict(self.data.filters),
        }


def read_classes(path: Path) -> list[str]:
    """Names of classes, one a line; ValueError for no such file, fewer than two, or one twice."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}); give a text file with a class name a line") from None
    if len(names) < 2 or len(set(map(_plain, names))) < len(names):
        raise ValueError(f"{path} must have two class names or more, a line each and none twice")
    return names


def _plain(name: str) -> str:
    return " ".join(name.lower().split())

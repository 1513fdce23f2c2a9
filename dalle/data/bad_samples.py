"""What cannot be used is skipped, counted and named, and stops a run only when there is much of it."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dalle.types import BadSample

CAUSES = (
    "unreadable image",
    "truncated",
    "wrong type",
    "decompression bomb",
    "too small",
    "empty caption",
    "caption not UTF-8",
    "missing twin",
    "leaves the folder",
    "broken row",
    "broken tar member",
    "unreadable shard",
)
MIN_BAD = 100
"""So many unusable samples never stop a run, whatever their share."""


class BadSampleError(ValueError):
    """A sample that cannot be used: its name, the cause (one of CAUSES) and what was found."""

    def __init__(self, name: str, cause: str, detail: str = ""):
        super().__init__(f"{name}: {cause}" + f" ({detail})" * bool(detail))
        self.name, self.cause, self.detail = name, cause, detail

    def __reduce__(self):
        return BadSampleError, (self.name, self.cause, self.detail)

    def skip(self, index: int | None = None) -> BadSample:
        """As a record for the log."""
        return BadSample(index, self.name, self.cause, self.detail)


def is_fault(cause: str) -> bool:
    """Whether a cause is a fault of the data; what a filter drops is not."""
    return not cause.startswith("filter:")


def check_bad_fraction(faults: int, seen: int, limit: float, where: str) -> None:
    """ValueError when more than MIN_BAD samples and more than a share `limit` of those seen are at fault."""
    if faults > MIN_BAD and faults > limit * seen:
        raise ValueError(
            f"{faults} of {seen} samples cannot be used ({faults / seen:.1%}, more than {limit:.1%}): {where}; "
            "mend or remove them (scripts/check_data.py lists all), or raise --data.max-bad-fraction"
        )


def count_causes(skips: Iterable[BadSample]) -> str:
    """ "3: 2 truncated, 1 empty caption"."""
    counts = Counter(skip.cause for skip in skips)
    return f"{counts.total()}: " + ", ".join(f"{number} {cause}" for cause, number in counts.most_common())


class BadSampleLog:
    """Counts by cause, and run/bad_samples.jsonl: one line for each sample, however often it is met.

    It goes on with the file of a stopped run. Nothing is written before the first sample is skipped.

    Args:
        path: the log; None only counts.
        size: samples of the set; None for an endless one.
        opening: what was found while the set was opened.
        limit: the share above which a run ends, once there are more than MIN_BAD.
    """

    def __init__(
        self, path: Path | None, size: int | None, opening: Sequence[BadSample] = (), limit: float = 0.01
    ):
        self.path, self.size, self.limit = path, size, limit
        self.counts: Counter[str] = Counter(skip.cause for skip in opening)
        self._opening = opening
        self._known = np.zeros(
            (size or 0) // 8 + 1, np.uint8
        )  # a bit a sample; pages never touched cost nothing
        self._faults, self._begun = 0, False

    def add(self, skips: Sequence[BadSample], step: int, seen: int, replaced: bool = False) -> None:
        """Takes what a step skipped. A first step of 0 begins the log anew, any other goes on with it.

        Args:
            skips: possibly known already.
            step: which.
            seen: samples that were asked for since the run began.
            replaced: in place of each that could not be used another was read, which adds to those seen.

        Raises:
            ValueError: more than MIN_BAD and more than the share `limit` of those seen.
        """
        if not self._begun:
            self._begin(fresh=step == 0)
        new = [skip for skip in skips if self._count(skip)]
        if new:
            self._write(new, "a")
            seen += self._faults * replaced
            seen = max(1, seen if self.size is None else min(seen, self.size))
            check_bad_fraction(self._faults, seen, self.limit, str(self))

    def _begin(self, fresh: bool) -> None:
        """What an earlier part of the run found, after what opening found."""
        self._begun = True
        there = self.path is not None and self.path.is_file()
        kept = [skip for skip in _read(self.path) if self._count(skip)] if there and not fresh else []
        if there or self._opening:
            self._write([*self._opening, *kept], "w")

    def _count(self, skip: BadSample) -> bool:
        """Whether it is a new one."""
        byte, bit = divmod(skip.index, 8)
        if byte >= len(self._known) or self._known[byte] >> bit & 1:
            return False
        self._known[byte] |= 1 << bit
        self.counts[skip.cause] += 1
        self._faults += is_fault(skip.cause)
        return True

    def _write(self, skips: Sequence[BadSample], mode: str) -> None:
        if self.path:
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(vars(skip)) + "\n" for skip in skips)

    def __str__(self) -> str:
        causes = ", ".join(f"{number} {cause}" for cause, number in self.counts.most_common())
        place = f"; each is named in {self.path}" if self.path and self.counts else ""
        return f"skipped {self.counts.total()} samples" + f": {causes}{place}" * bool(causes)


def _read(path: Path) -> Iterable[BadSample]:
    """The numbered samples of a log; a last line that broke off is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                skip = BadSample(**json.loads(line))
            except (ValueError, TypeError):
                return
            if skip.index is not None:
                yield skip

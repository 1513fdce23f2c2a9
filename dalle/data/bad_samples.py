"""Bad samples: skipped, counted and logged; a run ends only if there are too many."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dalle.data.config import UNUSED
from dalle.io.text import parse_json
from dalle.types import BadSample

MIN_BAD = 100
"""Up to this number of bad samples never ends a run."""


class BadSampleError(ValueError):
    """A sample that cannot be used: its name, the cause and details.

    Causes: unreadable image, truncated, wrong type, decompression bomb, too small; empty caption, caption
    not UTF-8; missing twin, leaves the folder; broken row, broken tar member, unreadable shard or folder.
    """

    def __init__(self, name: str, cause: str, detail: str = ""):
        super().__init__(f"{name}: {cause} ({detail})" if detail else f"{name}: {cause}")
        self.name, self.cause, self.detail = name, cause, detail

    def __reduce__(self):
        return BadSampleError, (self.name, self.cause, self.detail)

    def skip(self, index: int | None = None) -> BadSample:
        """The record of this sample."""
        return BadSample(index, self.name, self.cause, self.detail)


def check_bad_fraction(bad: int, seen: int, limit: float, details: str) -> None:
    """ValueError if more than MIN_BAD samples and more than a fraction `limit` of those seen are bad."""
    if bad > MIN_BAD and bad > limit * seen:
        raise ValueError(
            f"{bad} of {seen} samples cannot be used ({bad / seen:.1%}, more than {limit:.1%}): {details}; "
            "repair or remove them (scripts/check_data.py lists all), or raise --data.max-bad-fraction"
        )


def causes_text(counts: Counter[str]) -> str:
    """ "2 truncated, 1 empty caption"."""
    return ", ".join(f"{number} {cause}" for cause, number in counts.most_common())


def examples_text(samples: Sequence[BadSample]) -> str:
    """ "3: 2 truncated, 1 empty caption; for example a.png (truncated, no bytes), b.png (empty caption)"."""
    if not samples:
        return "0"
    causes = causes_text(Counter(bad.cause for bad in samples))
    named = []
    for bad in samples[:3]:
        detail = f", {bad.detail:.200}" if bad.detail else ""
        named.append(f"{bad.name:.200} ({bad.cause}{detail})")
    return f"{len(samples)}: {causes}; for example {', '.join(named)}"


class BadSampleLog:
    """Counts bad samples by cause and writes each once to a JSONL file, which a resumed run continues.

    Args:
        path: the file, written from the first bad sample on; None only counts.
        size: samples of the dataset; None if endless.
        opening: bad samples found while opening the dataset.
        limit: fraction of bad samples above which a run ends, once there are more than MIN_BAD.
    """

    def __init__(
        self, path: Path | None, size: int | None, opening: Sequence[BadSample] = (), limit: float = 0.01
    ):
        self.path, self.size, self.limit = path, size, limit
        self.counts: Counter[str] = Counter(bad.cause for bad in opening)
        self._opening = opening
        self._known = np.zeros(size or 0, bool)  # one byte per sample
        self._bad, self._started = 0, False

    def add(self, samples: Sequence[BadSample], step: int, seen: int, replaced: bool = False) -> None:
        """Adds the bad samples of a step; ValueError if there are too many.

        A first step of 0 starts a new file, any other continues it. `seen` counts the samples requested since
        the run started; if bad ones are `replaced`, the others that were read add to it.
        """
        if not self._started:
            self._start(fresh=step == 0)
            self._started = True
        new = [bad for bad in samples if self._count(bad)]
        if new:
            self._write(new, "a")
            seen += self._bad if replaced else 0
            seen = max(1, seen if self.size is None else min(seen, self.size))
            check_bad_fraction(self._bad, seen, self.limit, str(self))

    def _start(self, fresh: bool) -> None:
        """Writes what opening found, then what an earlier part of the run found."""
        exists = self.path is not None and self.path.is_file()
        earlier = []
        if exists and not fresh:
            for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with suppress(ValueError, TypeError):  # a line may be damaged
                    bad = BadSample(**parse_json(line, str(self.path)))
                    if type(bad.index) is int and bad.index >= 0 and isinstance(bad.cause, str):
                        earlier.append(bad)
        if exists or self._opening:
            self._write([*self._opening, *filter(self._count, earlier)], "w")

    def _count(self, bad: BadSample) -> bool:
        """Counts a sample; whether it is a new one."""
        if bad.index is None or bad.index >= len(self._known) or self._known[bad.index]:
            return False
        self._known[bad.index] = True
        self.counts[bad.cause] += 1
        self._bad += not bad.cause.startswith("filter:")  # a filtered sample is not at fault
        return True

    def _write(self, samples: Sequence[BadSample], mode: str) -> None:
        if self.path:
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(bad)) + "\n" for bad in samples)

    def __str__(self) -> str:
        details = f"; each is named in {self.path}" if self.path else ""
        causes = self.counts - Counter({UNUSED: self.counts[UNUSED]})
        unused = f"; {self.counts[UNUSED]} unused files" if self.counts[UNUSED] else ""
        counted = f": {causes_text(causes)}" if causes else ""
        return f"skipped {causes.total()} samples{counted}{unused}{details}"

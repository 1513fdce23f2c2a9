"""Filters of section 2.3. A stand-in with the names that `dalle.data.pairs` calls; it drops nothing."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FiltersConfig:
    """Which samples are dropped."""


class Filters:
    """Names the filter that drops a sample."""

    def __init__(self, config: FiltersConfig):
        self.config = config

    def reason(self, captions: Sequence[str], width: int, height: int, name: str | None = None) -> str | None:
        """The name of the first filter that drops a sample."""
        return None

    def captions(self, captions: Sequence[str]) -> list[str]:
        """Those that are kept."""
        return list(captions)

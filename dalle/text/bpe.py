"""Byte-pair encoding with BPE-dropout: the base class of text tokenizers.

Byte-pair encoding (Sennrich et al. 2016) splits a caption into pieces and a piece into symbols, and merges
neighboring symbols until no merge applies. A subclass defines the pieces and the symbols.
"""

import hashlib
import json
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from operator import index
from pathlib import Path
from typing import Any

from dalle.io.text import check_text

CACHED_PIECES = 65536
UNKNOWN_TEXT = "\ufffd"
"""Decoded form of the unknown token."""
WORD_START = "\u2581"
"""youtokentome's mark of a word's start."""

Merges = dict[tuple[int, int], tuple[int, int]]
"""Two ids -> (rank, merged id); the lowest rank is merged first."""


def apply_merges(symbols: list[int], merges: Merges, skip: Callable[[], bool]) -> list[int]:
    """Merge neighbors, the lowest rank first, until none is left (Provilkov et al. 2020, Algorithm 1).

    In every round a candidate is left out if skip() is true; it may be merged in a later round. A round
    without candidates is the last. Among equal ranks the leftmost is merged. With dropout youtokentome also
    redraws for merges that are no longer possible, so it drops less than Algorithm 1.
    """
    while True:
        pairs = enumerate(pairwise(symbols))
        candidates = [(merges[pair], at) for at, pair in pairs if pair in merges and not skip()]
        if not candidates:
            return symbols
        (_, merged), at = min(candidates)
        symbols[at : at + 2] = [merged]


def json_hash(data: Any) -> str:
    """SHA-256 of data as JSON, in one canonical form."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class BPETokenizer(ABC):
    """Captions to ids 0 .. vocab_size - 1. Saved and hashed by its plain data, `to_dict`."""

    vocab_size: int
    unknown_id: int | None = None
    """Id of text outside the vocabulary, where there is one."""

    def __init__(self, merges: Merges):
        self._merges = merges
        self._encode_piece = lru_cache(CACHED_PIECES)(
            lambda piece: apply_merges(self.symbols(piece), merges, skip=lambda: False)
        )

    @abstractmethod
    def pieces(self, caption: str) -> list[str]:
        """Parts of a caption that merges never cross."""

    @abstractmethod
    def symbols(self, piece: str) -> list[int]:
        """Ids of a piece before merging."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """A readable caption."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All of the tokenizer as JSON types."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: dict[str, Any]) -> "BPETokenizer":
        """The inverse of to_dict; ValueError for other data."""

    def __reduce__(self):
        return type(self).from_dict, (self.to_dict(),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, hash={self.hash[:16]})"

    def encode(
        self, caption: str, dropout: float = 0.0, seed: tuple[int, ...] | int | None = None
    ) -> list[int]:
        """Token ids of a caption.

        Args:
            dropout: probability of skipping a merge; 10 % in the paper's training (Section 2.2).
            seed: required with dropout, for example (seed, epoch, sample).
        """
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability in [0, 1], not {dropout!r}")
        check_text(caption)
        pieces = self.pieces(caption)
        if dropout == 0:
            return list(chain.from_iterable(map(self._encode_piece, pieces)))
        if seed is None:
            raise ValueError("encoding with dropout is random: give a seed, such as (seed, epoch, sample)")
        seed = seed if isinstance(seed, tuple) else (seed,)
        rng = random.Random(repr([index(number) for number in seed]))
        words = [apply_merges(self.symbols(p), self._merges, lambda: rng.random() < dropout) for p in pieces]
        return [token for word in words for token in word]

    def out_of_vocabulary(self, caption: str) -> list[str]:
        """Pieces of a caption with characters outside the vocabulary, which become bytes or unknown."""
        return [piece for piece in self.pieces(caption) if self.unknown_id in self.symbols(piece)]

    def check_token(self, position: int, token: int) -> int:
        """The token as an int; ValueError if it is not in the vocabulary."""
        token = index(token)
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} at position {position} is not in 0 .. {self.vocab_size - 1}")
        return token

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of `to_dict`."""
        return json_hash(self.to_dict())

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, under a temporary name that is then renamed."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_dict()), encoding="ascii")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

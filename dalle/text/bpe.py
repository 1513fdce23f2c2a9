"""What all byte-pair tokenizers share: pieces of a caption, merges with BPE-dropout, a hash, a file.

Byte-pair encoding (Sennrich et al. 2016) splits a caption into pieces, a piece into symbols, and joins
neighbours until no merge applies. Tokenizers differ in how they split and in what a symbol is; that is what a
subclass says.
"""

import hashlib
import json
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any

CACHED_PIECES = 65536

Merges = dict[tuple[int, int], tuple[int, int]]
"""Two ids -> (rank, the id that joins them); the lowest rank is merged first."""


def apply_merges(symbols: list[int], merges: Merges, skip: Callable[[], bool]) -> list[int]:
    """Merge neighbours, the lowest rank first, until none is left (Provilkov et al. 2020, Algorithm 1).

    In every round each candidate is left out if skip() says so, and comes back in the next round; a round
    without candidates is the last. Among equal ranks the leftmost is merged. At dropout 0 youtokentome and
    Hugging Face agree. With dropout youtokentome draws also for merges that are no longer possible, each of
    which gives the others one more chance, so it drops less than Algorithm 1.
    """
    while True:
        pairs = enumerate(pairwise(symbols))
        candidates = [(merges[pair], at) for at, pair in pairs if pair in merges and not skip()]
        if not candidates:
            return symbols
        (_, merged), at = min(candidates)
        symbols[at : at + 2] = [merged]


class BPETokenizer(ABC):
    """Captions to ids. A subclass splits, spells, decodes, and holds itself as plain data.

    Args:
        merges: which symbols are joined, and in which order.
    """

    vocab_size: int
    """Ids are 0 .. vocab_size - 1."""

    def __init__(self, merges: Merges):
        self._merges = merges
        self._encode_piece = lru_cache(CACHED_PIECES)(self._encode_piece_uncached)

    @abstractmethod
    def pieces(self, caption: str) -> list[str]:
        """What merges never cross."""

    @abstractmethod
    def symbols(self, piece: str) -> list[int]:
        """The ids of a piece before merging."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """A readable caption."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All there is to it, in types that JSON knows, as a checkpoint holds it."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: dict[str, Any]) -> "BPETokenizer":
        """The inverse of to_dict; ValueError if data is anything else."""

    def __reduce__(self):
        return type(self).from_dict, (self.to_dict(),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, hash={self.hash[:16]})"

    def encode(
        self, caption: str, dropout: float = 0.0, seed: tuple[int, ...] | int | None = None
    ) -> list[int]:
        """Token ids of a caption, as many as it takes.

        Args:
            dropout: probability of skipping a merge; 10 % in the paper's training (section 2.2).
            seed: with dropout, what the result depends on besides the caption, such as (seed, epoch, sample).
        """
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability in [0, 1], not {dropout!r}")
        if not isinstance(caption, str):
            raise TypeError(f"a caption must be a str, not {type(caption).__name__}: {caption!r:.80}")
        pieces = self.pieces(caption)
        if dropout == 0:
            return [token for piece in pieces for token in self._encode_piece(piece)]
        draw = _generator(seed).random

        def skip() -> bool:
            return draw() < dropout

        words = [apply_merges(self.symbols(piece), self._merges, skip) for piece in pieces]
        return [token for word in words for token in word]

    def _encode_piece_uncached(self, piece: str) -> list[int]:
        return apply_merges(self.symbols(piece), self._merges, skip=lambda: False)

    def check_token(self, position: int, token: int) -> int:
        """The token as an int; ValueError, naming its position, if it is not in the vocabulary."""
        token = index(token)
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"token {token} at position {position} is not in the vocabulary 0 .. {self.vocab_size - 1}"
            )
        return token

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON; equal hashes encode alike."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON under a temporary name, then rename: the old file or the new one is there, whole."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_dict()), encoding="ascii")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _generator(seed: tuple[int, ...] | int | None) -> random.Random:
    """A generator of its own; the same seed gives the same draws on every machine."""
    if seed is None:
        raise ValueError("encoding with dropout is random: give a seed, such as (seed, epoch, sample)")
    numbers = [index(number) for number in (seed if isinstance(seed, tuple) else (seed,))]
    return random.Random(repr(numbers))

"""Sample order as a function of (seed, step), so that a resume needs no state.

Every epoch is a permutation of the dataset that depends on (seed, epoch). It is a Feistel network (Luby and
Rackoff 1988) over the smallest power of two that holds the dataset; a number outside is passed through again
until it falls inside (cycle walking, Black and Rogaway 2002). So the position of any sample of a billion is
computed without a table, the same by every process.
"""

from functools import lru_cache

import numpy as np

from dalle.sampling import generator

ROUNDS = 8
MIN_BITS = 6
"""Smaller networks have too few keys."""


def batch_indices(
    step: int, batch_size: int, size: int | None, seed: int, rank: int = 0, world: int = 1
) -> list[tuple[int, int]]:
    """(epoch, index) of each sample of a step.

    A batch may span two epochs; each sample comes exactly once per epoch. An endless dataset (size None) is
    read in order. Each of `world` processes takes an equal share; the shares in rank order are the step of
    one process.

    Raises:
        ValueError: the batch does not divide into shares.
    """
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} does not divide among {world} processes; give a multiple")
    share = batch_size // world
    first = step * batch_size + rank * share
    if size is None:
        return [(0, position) for position in range(first, first + share)]
    samples: list[tuple[int, int]] = []
    while len(samples) < share:
        epoch, start = divmod(first + len(samples), size)
        positions = np.arange(start, min(size, start + share - len(samples)), dtype=np.uint64)
        samples += [(epoch, int(index)) for index in _permutation(size, "order", seed, epoch)(positions)]
    return samples


class FeistelPermutation:
    """A random permutation of range(size), a function of purpose and key, without a table.

    Maps positions, uint64 (n,), to numbers, uint64 (n,).
    """

    def __init__(self, size: int, purpose: str, *key: int):
        self.size = size
        bits = max(MIN_BITS, (size - 1).bit_length())
        self.low = np.uint64(bits // 2)
        self.masks = np.uint64(2 ** (bits - bits // 2) - 1), np.uint64(2 ** (bits // 2) - 1)  # high, low
        self.keys = generator(purpose, *key).integers(2**64, size=ROUNDS, dtype=np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        numbers = self._network(np.asarray(positions, np.uint64))
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._network(numbers[outside])
        return numbers

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        """One pass: each half in turn is mixed with a keyed hash of the other."""
        high, low = numbers >> self.low, numbers & self.masks[1]
        for turn, key in enumerate(self.keys):
            if turn % 2:
                low = low ^ (_splitmix64(high + key) & self.masks[1])
            else:
                high = high ^ (_splitmix64(low + key) & self.masks[0])
        return high << self.low | low


_permutation = lru_cache(maxsize=4)(FeistelPermutation)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014); products wrap at 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_stream(seed: int, epoch: int) -> int:
    """The stream of an epoch of a run; seeds and epochs below 2^32."""
    return seed << 32 | epoch

"""Which samples a step takes: a function of (seed, step), so that resuming needs no state.

Every epoch is a permutation of the set, drawn from (seed, epoch). It is a Feistel network (Luby and Rackoff
1988) over the smallest power of two that holds the set; a number that falls outside is put through again
until it falls inside ("cycle walking", Black and Rogaway 2002). So the place of any sample of a billion is
computed alone, without a table, and any process finds the same.
"""

from functools import lru_cache

import numpy as np

from dalle.io.rng import generator

ROUNDS = 8
"""Twice what makes a Feistel network indistinguishable from chance to one who may ask both ways."""
LEAST_BITS = 6
"""Smaller networks have too few keys; a set of three walks in 64 numbers."""


def batch_indices(
    step: int, batch_size: int, size: int | None, seed: int, rank: int = 0, world: int = 1
) -> list[tuple[int, int]]:
    """(epoch, index) of each sample of a step.

    Positions go on from step to step, so a batch may span two epochs and each sample comes exactly once in
    each: there is no short last batch and none is dropped. An endless set (size None) is read in its own
    order, once. With `world` processes each takes an equal share of the step, and the shares in the order of
    their rank are the step of a single process.

    Raises:
        ValueError: the batch does not divide into shares, or there is no such rank.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in 0 .. {world - 1} for {world} processes, got {rank}")
    if batch_size % world:
        raise ValueError(
            f"a batch of {batch_size} does not divide among {world} processes; make it a multiple"
        )
    share = batch_size // world
    first = step * batch_size + rank * share
    if size is None:
        return [(0, position) for position in range(first, first + share)]
    samples: list[tuple[int, int]] = []
    while len(samples) < share:
        epoch, place = divmod(first + len(samples), size)
        places = np.arange(place, min(size, place + share - len(samples)), dtype=np.uint64)
        samples += [(epoch, int(index)) for index in epoch_order(seed, epoch, size)(places)]
    return samples


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> "FeistelPermutation":
    """The order of an epoch: place -> index."""
    return FeistelPermutation(size, "order", seed, epoch)


class FeistelPermutation:
    """A permutation of range(size), drawn from a purpose and a key, that takes no memory.

    Called with places, uint64 (n,), it gives the number at each, uint64 (n,).
    """

    def __init__(self, size: int, purpose: str, *key: int):
        if size < 1:
            raise ValueError(f"a permutation needs at least one number, got {size}")
        self.size = size
        bits = max(LEAST_BITS, (size - 1).bit_length())
        self.low = np.uint64(bits // 2)
        self.masks = np.uint64(2 ** (bits - bits // 2) - 1), np.uint64(2 ** (bits // 2) - 1)  # high, low
        self.keys = generator(purpose, *key).integers(2**64, size=ROUNDS, dtype=np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        numbers = self._network(np.asarray(places, np.uint64))
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._network(numbers[outside])
        return numbers

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        """One pass over the power of two: each half in turn is mixed with a keyed hash of the other."""
        high, low = numbers >> self.low, numbers & self.masks[1]
        for turn, key in enumerate(self.keys):
            if turn % 2:
                low = low ^ (_scramble(high + key) & self.masks[1])
            else:
                high = high ^ (_scramble(low + key) & self.masks[0])
        return high << self.low | low


def _scramble(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014); products wrap at 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

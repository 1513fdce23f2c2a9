"""Which samples a step takes: a function of (seed, step), so that resuming needs no state."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from dalle.rng import generator


def samples_of_step(step: int, batch_size: int, size: int | None, seed: int) -> Iterator[tuple[int, int]]:
    """(epoch, index) of each sample of a step.

    Every epoch is its own permutation of the set, drawn from (seed, epoch); a batch may span two. An
    endless set (size None) is read in its own order, once.
    """
    for position in range(step * batch_size, (step + 1) * batch_size):
        if size is None:
            yield 0, position
        else:
            epoch, place = divmod(position, size)
            yield epoch, int(_permutation(seed, epoch, size)[place])


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return generator("order", seed, epoch).permutation(size)

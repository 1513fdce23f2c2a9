"""Random numbers by name: the same (stream, index) always gives the same numbers.

Philox is counter-based, so a generator costs microseconds and needs no state to be saved.
"""

import numpy as np


def generator(stream: int, index: int = 0) -> np.random.Generator:
    """A generator of its own for every pair of whole numbers below 2^64."""
    key = np.array([stream % 2**64, index % 2**64], dtype=np.uint64)  # through a list, large keys become floats
    return np.random.Generator(np.random.Philox(key=key))


def epoch_stream(seed: int, epoch: int) -> int:
    """The stream of an epoch of a run; seeds and epochs below 2^32."""
    return seed << 32 | epoch

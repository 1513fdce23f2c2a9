"""Random generators by name: the same purpose and key always give the same generator.

Philox is counter-based: a generator costs microseconds and has no state to save.
"""

import hashlib

import numpy as np


def generator(purpose: str, *key: int | str) -> np.random.Generator:
    """A generator for a purpose ("scene", "caption", ...) and a key; text comes last in a key."""
    digest = hashlib.blake2b("\n".join([purpose, *map(str, key)]).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))


def epoch_stream(seed: int, epoch: int) -> int:
    """The stream of an epoch of a run; seeds and epochs below 2^32."""
    return seed << 32 | epoch

"""Random numbers by name: the same purpose and numbers always give the same generator.

Philox is counter-based, so a generator costs microseconds and needs no state to be saved. The purpose keeps
apart what else has the same numbers: the scene of image 7 and the choice of a caption for image 7.
"""

import hashlib

import numpy as np


def generator(purpose: str, *key: int | str) -> np.random.Generator:
    """A generator of its own for every purpose ("scene", "caption", ...) and key; text stands last in a
    key."""
    digest = hashlib.blake2b("\n".join([purpose, *map(str, key)]).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))


def epoch_stream(seed: int, epoch: int) -> int:
    """The stream of an epoch of a run; seeds and epochs below 2^32."""
    return seed << 32 | epoch

"""Many short texts in little memory, and the hash of a name that decides its split."""

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np


class Names:
    """Texts by number, kept as one run of bytes: a million file names take tens of megabytes."""

    def __init__(self, texts: Iterable[str]):
        data, ends = bytearray(), array("Q", [0])
        for text in texts:
            data += text.encode("utf-8", "surrogatepass")
            ends.append(len(data))
        self._data, self._ends = bytes(data), np.array(ends, np.uint64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = int(self._ends[index]), int(self._ends[index + 1])
        return self._data[start:end].decode("utf-8", "surrogatepass")

    def digest(self) -> str:
        """16 hex characters of all texts."""
        return hashlib.blake2b(self._data + b"\n" + self._ends.tobytes(), digest_size=8).hexdigest()


def share(name: str) -> int:
    """A number below 2^32 that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).digest())

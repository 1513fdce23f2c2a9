"""Images that are there twice, also scaled or saved anew (paper section 2.3 filters; C).

A hash of 64 bits finds candidates, small copies of the images decide. The hash is the sign of the lowest 8 x 8
frequencies of the grey image (pHash), here against a margin instead of the median, so that the noise of saving
does not toss the bits of flat images. Candidates differ in at most DISTANCE bits; they are found by bands
(Manku et al. 2007): of DISTANCE + 2 bands two or more must be equal, so sorting by each pair of bands brings all
candidates side by side without comparing all with all.

    N images, P pairs, T side of a small copy
"""

from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise

import numpy as np
from PIL import Image

DISTANCE = 4
"""Bits in which the hashes of an image and its copy may differ."""
LIKENESS = 0.1
"""The difference of two small copies, against what is in the image, up to which they are the same."""
SIDE = 32
"""T: of the grey image whose frequencies are taken, and of small copies."""
MARGIN = 128.0
"""Of a frequency, in grey levels summed over T x T with cosine weights; flat images stay below."""


def image_hash(image: Image.Image) -> int:
    """64 bits that stay almost the same when an image is scaled, saved anew or made a little brighter."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    frequencies = _cosines() @ grey @ _cosines().T
    frequencies[0, 0] = 0  # the brightness
    return int.from_bytes(np.packbits(frequencies > MARGIN).tobytes())


@cache
def _cosines() -> np.ndarray:
    """The eight lowest waves of the discrete cosine transform, (8, T)."""
    return np.cos(np.pi * np.arange(8)[:, None] * (np.arange(SIDE) + 0.5) / SIDE)


def small_copy(image: Image.Image) -> np.ndarray:
    """uint8 (T, T, 3), for `copies`."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))


def alike(hashes: np.ndarray, distance: int = DISTANCE) -> list[list[int]]:
    """Groups of two or more whose hashes are joined by steps of at most `distance` bits.

    Args:
        hashes: uint64 (N,).
        distance: bits.

    Returns:
        Numbers of images, ascending in each group.
    """
    unique, member = np.unique(np.asarray(hashes, dtype=np.uint64), return_inverse=True)
    root = list(range(len(unique)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    for a, b in near_pairs(unique, distance).tolist():
        root[find(b)] = find(a)
    groups: dict[int, list[int]] = {}
    for index, i in enumerate(member.tolist()):
        groups.setdefault(find(i), []).append(index)
    return sorted(group for group in groups.values() if len(group) > 1)


def near_pairs(hashes: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
    """Pairs of numbers, int64 (P, 2), first below second, whose hashes differ in at most `distance` bits."""
    if not 0 <= distance <= 30:
        raise ValueError(f"distance must be 0 to 30 of the 64 bits, got {distance}")
    cuts = np.linspace(0, 64, distance + 3).astype(int)  # distance + 2 bands
    bands = [((1 << int(high - low)) - 1) << int(low) for low, high in pairwise(cuts)]
    found = [_pairs_in_bands(hashes, np.uint64(a | b), distance) for a, b in combinations(bands, 2)]
    return np.unique(np.concatenate(found), axis=0)


def _pairs_in_bands(hashes: np.ndarray, mask: np.uint64, distance: int) -> np.ndarray:
    """Those near pairs that agree in every bit of the mask."""
    keys = hashes & mask
    order = np.argsort(keys, kind="stable")
    keys, hashes = keys[order], hashes[order]
    found = [np.empty((0, 2), dtype=np.int64)]
    for step in range(1, len(keys)):
        (first,) = np.nonzero(keys[step:] == keys[:-step])
        if not len(first):
            break
        near = first[_count_bits(hashes[first] ^ hashes[first + step]) <= distance]
        found.append(np.sort(np.stack([order[near], order[near + step]], axis=1), axis=1))
    return np.concatenate(found)


def _count_bits(words: np.ndarray) -> np.ndarray:
    """Ones in each 64-bit word."""
    return np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)


def copies(images: Sequence[np.ndarray]) -> list[int | None]:
    """For each small copy, the number of the first one that shows the same image, or None for a first one.

    Args:
        images: of one group, from `small_copy`.
    """
    originals: list[int] = []
    firsts: list[int | None] = []
    for i, image in enumerate(images):
        same = [j for j in originals if unlikeness(images[j], image) <= LIKENESS]
        firsts.append(same[0] if same else None)
        if not same:
            originals.append(i)
    return firsts


def unlikeness(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of the difference of two small copies over that of the flatter one from its mean color."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    contents = min(_spread(a), _spread(b))
    return float(
        np.sqrt(np.square(a - b).mean()) / max(contents, 1.0)
    )  # one level: flat images compare by color


def _spread(image: np.ndarray) -> float:
    return float(np.sqrt(np.square(image - image.mean(axis=(0, 1))).mean()))

"""Near-duplicate images, rescaled and re-encoded copies included (paper section 2.3, appendix C).

A 64-bit perceptual hash (pHash: the lowest 8 x 8 frequencies of the gray image, here against a margin, so
that noise does not flip the bits of flat images) finds candidates, thumbnails decide. Hashes that differ in d
bits agree in two of d + 2 bands (Manku et al. 2007), so sorting by each pair of bands finds all candidates.
"""

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
from PIL import Image

DISTANCE = 4
"""Bits in which the hashes of an image and its copy may differ."""
MAX_RMSE = 0.1
"""Difference of two thumbnails, relative to their contrast, up to which they show the same image."""
SIDE = 32
"""Side of a thumbnail in pixels."""
MARGIN = 128.0
"""Threshold of a frequency, in gray levels summed over a thumbnail; flat images stay below."""


def image_hash(image: Image.Image) -> int:
    """64 bits that hardly change when an image is rescaled, re-encoded or slightly brightened."""
    gray = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    cosines = np.cos(np.pi * np.arange(8)[:, None] * (np.arange(SIDE) + 0.5) / SIDE)
    frequencies = cosines @ gray @ cosines.T  # the lowest of the discrete cosine transform
    frequencies[0, 0] = 0  # brightness
    return int.from_bytes(np.packbits(frequencies > MARGIN).tobytes())


def thumbnail(image: Image.Image) -> np.ndarray:
    """uint8 (SIDE, SIDE, 3), for `find_copies`."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))


def near_duplicate_groups(hashes: np.ndarray, distance: int = DISTANCE) -> list[list[int]]:
    """Groups of indices, ascending, whose hashes are connected by steps of at most `distance` bits."""
    unique, member = np.unique(np.asarray(hashes, dtype=np.uint64), return_inverse=True)
    root = list(range(len(unique)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    for a, b in hamming_neighbors(unique, distance).tolist():
        root[find(b)] = find(a)
    groups: dict[int, list[int]] = {}
    for index, i in enumerate(member.tolist()):
        groups.setdefault(find(i), []).append(index)
    return sorted(group for group in groups.values() if len(group) > 1)


def hamming_neighbors(hashes: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
    """Pairs of indices, int64 (P, 2), the smaller first, whose hashes differ in at most `distance` bits."""
    cuts = np.linspace(0, 64, distance + 3).astype(int)
    bands = [((1 << int(high - low)) - 1) << int(low) for low, high in pairwise(cuts)]
    found = [_neighbors_in_bands(hashes, np.uint64(a | b), distance) for a, b in combinations(bands, 2)]
    return np.unique(np.concatenate(found), axis=0)


def _neighbors_in_bands(hashes: np.ndarray, mask: np.uint64, distance: int) -> np.ndarray:
    """The neighbors that agree in every bit of the mask."""
    order = np.argsort(hashes & mask, kind="stable")
    hashes = hashes[order]
    keys = hashes & mask
    found = [np.empty((0, 2), dtype=np.int64)]
    for step in range(1, len(keys)):
        (first,) = np.nonzero(keys[step:] == keys[:-step])
        if not len(first):
            break
        near = first[np.bitwise_count(hashes[first] ^ hashes[first + step]) <= distance]
        found.append(np.sort(np.stack([order[near], order[near + step]], axis=1), axis=1))
    return np.concatenate(found)


def find_copies(thumbnails: Sequence[np.ndarray]) -> list[int | None]:
    """For each thumbnail the index of the first one that shows the same image; None for a first one."""
    originals: list[int] = []
    firsts: list[int | None] = []
    for i, image in enumerate(thumbnails):
        first = next((j for j in originals if relative_rmse(thumbnails[j], image) <= MAX_RMSE), None)
        firsts.append(first)
        if first is None:
            originals.append(i)
    return firsts


def relative_rmse(a: np.ndarray, b: np.ndarray) -> float:
    """RMS difference of two thumbnails over the RMS contrast of the flatter one."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    contrast = min(np.sqrt(np.square(image - image.mean(axis=(0, 1))).mean()) for image in (a, b))
    return float(np.sqrt(np.square(a - b).mean()) / max(contrast, 1.0))  # flat images compare by color

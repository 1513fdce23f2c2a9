"""Expected value of the best of N candidates, N = 1, 2, 4, ..., from one pool (paper section 2.6, Figure 9c).

The mean over all subsets of N of the M candidates has no bias and less variance than N fresh candidates. With
the candidates ordered best first, candidate i (from 0) is the best of a subset with probability
C(M - 1 - i, N - 1) / C(M, N).

    C captions, M candidates of each
"""

import math
from collections.abc import Sequence

import numpy as np


def sizes(candidates: int) -> list[int]:
    """1, 2, 4, ... up to the number of candidates, which comes last in any case."""
    powers = [2**k for k in range(candidates.bit_length()) if 2**k < candidates]
    return [*powers, candidates]


def best_of_n(
    scores: np.ndarray, values: np.ndarray | None = None, ns: Sequence[int] | None = None
) -> dict[int, float]:
    """Expected value (C, M) of the candidate with the highest score (C, M) among n, for each n.

    Candidates of equal score get their mean value. By default the values are the scores.
    """
    scores = np.asarray(scores, dtype=np.float64)
    values = scores if values is None else np.asarray(values, dtype=np.float64)
    if scores.ndim != 2 or scores.shape != values.shape or not scores.size:
        raise ValueError(f"expected two arrays of one shape (C, M), got {scores.shape}, {values.shape}")
    if not (np.isfinite(scores).all() and np.isfinite(values).all()):
        raise ValueError("a score or value is not finite")
    best_first = []
    for row_scores, row_values in zip(scores, values, strict=True):
        _, group, size = np.unique(-row_scores, return_inverse=True, return_counts=True)
        best_first.append(np.repeat(np.bincount(group, row_values) / size, size))
    means, m = np.mean(best_first, axis=0), scores.shape[1]
    curve = {}
    for n in ns or sizes(m):
        if not 1 <= n <= m:
            raise ValueError(f"n must be 1 to {m}, got {n}")
        chances = [math.comb(m - 1 - i, n - 1) / math.comb(m, n) for i in range(m)]
        curve[n] = float(means @ chances)
    return curve

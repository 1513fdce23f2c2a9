"""What the best of N candidates is worth, for N = 1, 2, 4, ... from one pool (paper section 2.6, Figure 9c).

From M candidates of a caption N can be drawn in many ways; the mean over all of them, without drawing, has no
bias and less noise than N fresh candidates. With the candidates ordered best first by the scorer, candidate i
(from 0) is the best of N distinct ones with probability C(M - 1 - i, N - 1) / C(M, N).

    C captions, M candidates of each
"""

import math
from collections.abc import Sequence

import numpy as np


def sizes(candidates: int) -> list[int]:
    """1, 2, 4, ... up to the number of candidates, which comes last in any case."""
    if candidates < 1:
        raise ValueError(f"a pool needs one candidate or more, got {candidates}")
    powers = [2**k for k in range(candidates.bit_length()) if 2**k <= candidates]
    return powers if powers[-1] == candidates else [*powers, candidates]


def best_probabilities(candidates: int, n: int) -> np.ndarray:
    """(M,) probability that each candidate, best first, is the best of n distinct ones; they add up to 1."""
    if not 1 <= n <= candidates:
        raise ValueError(f"n must be 1 to {candidates}, got {n}")
    return np.array(
        [math.comb(candidates - 1 - i, n - 1) / math.comb(candidates, n) for i in range(candidates)]
    )


def best_of_n(
    scores: np.ndarray, values: np.ndarray | None = None, ns: Sequence[int] | None = None
) -> dict[int, float]:
    """The expected value of the candidate that the scorer would put first among n of them, for each n.

    Args:
        scores: (C, M) by the scorer that ranks. Equal ones share their chances.
        values: (C, M), what is asked of the one that is kept; the scores themselves unless given.
        ns: the numbers; powers of two unless given.
    """
    scores = np.asarray(scores, dtype=np.float64)
    values = scores if values is None else np.asarray(values, dtype=np.float64)
    if scores.ndim != 2 or scores.shape != values.shape or not scores.size:
        raise ValueError(
            f"expected scores and values of one shape (C, M), got {scores.shape} and {values.shape}"
        )
    if not (np.isfinite(scores).all() and np.isfinite(values).all()):
        raise ValueError("a score or value is not finite")
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = _average_ties(np.take_along_axis(scores, order, 1), np.take_along_axis(values, order, 1))
    return {
        n: float(ranked.mean(0) @ best_probabilities(scores.shape[1], n))
        for n in ns or sizes(scores.shape[1])
    }


def _average_ties(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Candidates of equal score have their mean value: which of them comes first is chance."""
    shared = values.copy()
    for row, mine in zip(scores, shared, strict=True):
        _, group, count = np.unique(row, return_inverse=True, return_counts=True)
        mine[:] = (np.bincount(group, mine) / count)[group]
    return shared

"""Many whole numbers in few words: counted, as a share of all, spread out, drawn in bars."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

BAR = 40
"""Characters of a bar that stands for all."""


def share(count: int, of: int) -> dict[str, Any]:
    """So many samples of so many, as a report has it."""
    return {"samples": count, "of": of, "share": round(count / max(1, of), 6)}


def said(numbers: dict[str, Any]) -> str:
    """A `share` in words: "3 of 20 (15.00%)"."""
    return f"{numbers['samples']:,} of {numbers['of']:,} ({numbers['share']:.2%})"


def summary(counts: Counter[int]) -> dict[str, Any]:
    """Mean, percentiles and a histogram by doubling of numbers of which `counts` tells how often each is there.

    A percentile is the least number up to which so many of 100 reach. Empty for none.
    """
    if not counts:
        return {}
    values, total = sorted(counts), counts.total()
    reached: dict[int, int] = {}
    below = 0
    for value in values:
        below += counts[value]
        for percent in (5, 50, 95):
            if 100 * below >= percent * total:
                reached.setdefault(percent, value)
    return {
        "least": values[0],
        "5_of_100": reached[5],
        "median": reached[50],
        "mean": round(sum(value * count for value, count in counts.items()) / total, 2),
        "95_of_100": reached[95],
        "most": values[-1],
        "histogram": doublings(counts),
    }


def doublings(counts: Counter[int]) -> dict[str, int]:
    """Counts of 0, 1, 2-3, 4-7, 8-15 and so on, from the first that is not empty to the last."""
    bits = counts_of(counts, int.bit_length)
    edges = [0, *(1 << k for k in range(max(bits) + 1))]
    return {
        f"{low}-{high - 1}" if high - low > 1 else f"{low}": bits[k]
        for k, (low, high) in enumerate(pairwise(edges))
        if k >= min(bits)
    }


def counts_of(counts: Counter, key: Callable[[Any], Any]) -> Counter:
    """How often each key(value) is there."""
    summed: Counter = Counter()
    for value, count in counts.items():
        summed[key(value)] += count
    return summed


def aspect(size: tuple[int, int]) -> str:
    """The shape of an image of (width, height): "square", "wide, up to 4:3", "tall, beyond 2:1"."""
    longer, shorter = max(size), min(size)
    if longer == shorter:
        return "square"
    reach = (
        "up to 4:3" if 3 * longer <= 4 * shorter else "up to 2:1" if longer <= 2 * shorter else "beyond 2:1"
    )
    return f"{'wide' if size[0] > size[1] else 'tall'}, {reach}"


def tell_summary(title: str, numbers: dict[str, Any]) -> None:
    """Prints a `summary`; nothing for none."""
    if "histogram" in numbers:
        middle = f"median {numbers['median']}, 90 of 100 from {numbers['5_of_100']} to {numbers['95_of_100']}"
        tell_bars(f"{title}: {middle}, {numbers['least']} to {numbers['most']} in all", numbers["histogram"])


def tell_bars(title: str, counts: dict[str, int]) -> None:
    """Prints a line with a bar for each count."""
    if counts:
        print(title)
    total, width = sum(counts.values()), max(map(len, counts), default=0)
    for name, count in counts.items():
        print(f"  {name:>{width}}  {count:9,}  {'#' * round(BAR * count / total)}".rstrip())


def plain(value: Any) -> Any:
    """Text, at any depth, that can be written as UTF-8: names of files and captions out of JSON need not be."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value

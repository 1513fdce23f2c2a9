"""MeanMetric over all samples of values that come in batches."""

from collections.abc import Mapping

from torch import Tensor


class MeanMetric:
    """Every sample weighs the same, whatever its batch; float64."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Takes a value a sample: name -> (B,)."""
        for name, each in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(each.double().sum())
            self.counts[name] = self.counts.get(name, 0) + each.numel()

    def values(self) -> dict[str, float]:
        """Name -> mean; ValueError for none."""
        if not any(self.counts.values()):
            raise ValueError("nothing to measure; expected one sample or more")
        return {name: total / self.counts[name] for name, total in self.sums.items()}

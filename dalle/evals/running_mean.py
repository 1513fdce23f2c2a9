"""MeanMetric: means over samples that come in batches."""

from collections.abc import Mapping

from torch import Tensor


class MeanMetric:
    """Means in float64; every sample weighs the same, whatever its batch."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds a batch: values (B,) by name."""
        for name, each in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(each.cpu().double().sum())
            self.counts[name] = self.counts.get(name, 0) + each.numel()

    def values(self) -> dict[str, float]:
        """Means by name; ValueError without a sample."""
        if not any(self.counts.values()):
            raise ValueError("nothing to measure; expected one sample or more")
        return {name: total / self.counts[name] for name, total in self.sums.items()}

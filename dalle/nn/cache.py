"""Keys and values of the slots already read, so that sampling reads each slot once.

B batch, H heads, N slots, d width of a head
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerCache:
    """Fixed buffers of one attention layer, (B, H, N, d) each, filled from the front."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, slots: int, width: int, like: Tensor) -> "LayerCache":
        """Buffers on the device and in the dtype of `like`."""
        shape = (batch, heads, slots, width)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def append(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes slots start .. start + n and returns everything up to there."""
        end = start + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def repeat(self, times: int) -> "LayerCache":
        """Each row `times` times in a row: one caption, many candidates."""
        return LayerCache(*(torch.repeat_interleave(t, times, dim=0) for t in (self.keys, self.values)))

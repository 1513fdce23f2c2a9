"""PowerSGD's settings: which gradients are factored, at which rank, and what that saves (2.5, Tables 1 and 2).

d width, r rank of all shards together, m shards of each matrix
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dalle.train.optimizer import hidden_matrices

RANKS = {1920: 512, 2688: 640, 3968: 896}
"""Width -> rank (Table 1): the least multiple of 128 that left no gap in the training loss."""


@dataclass(frozen=True)
class PowerSGDConfig:
    """How replicas average their gradients. Without replicas there is nothing to send, and none of it matters."""

    rank: int | None = None
    """Of all shards of a matrix together: 896 for 12 billion parameters (Table 1); null sends gradients whole."""
    start: int = 0
    """The update from which gradients are factored; earlier ones are sent whole."""
    q: Literal["fixed", "updated", "redrawn"] = "fixed"
    """The random matrix: kept (the paper), the last Q' ("warm start"), or drawn anew for each update."""
    formats: Literal["fp32", "paper"] = "fp32"
    """Of error buffers and messages: paper rounds them to 1-6-9, emulated (E.2)."""

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be positive, or null to send gradients whole, got {self.rank}")
        if self.start < 0:
            raise ValueError(f"start cannot be negative, got {self.start}")


def compression_rate(width: int, rank: int, shards: int = 8) -> float:
    """Share of the gradients of the layers' matrices that is not sent (Table 2): 1 - 5 r / 8 d for 8 shards."""
    return 1 - rank * (shards + 2) / (2 * width * shards)


def stacked_matrices(model: nn.Module) -> dict[str, int]:
    """Names of the layers' matrices, and how many each parameter holds one below the other.

    Queries, keys and values have a matrix each in the paper; here they share a parameter.
    """
    return {
        name: 3 if name.endswith(("qkv.weight", "in_proj_weight")) else 1
        for name, _ in hidden_matrices(model)
    }


def plan_ranks(shape: tuple[int, ...], stacked: int, rank: int) -> list[int] | None:
    """The rank of each of the matrices stacked in a shard; None where the factors would be no smaller.

    Args:
        shape: (rows, columns) of the shard.
        stacked: matrices one below the other.
        rank: of one shard.
    """
    heights = [len(part) for part in torch.empty(shape[0], device="meta").tensor_split(stacked)]
    if any(rank * (height + shape[1]) >= height * shape[1] for height in heights):
        return None
    return [rank] * stacked


def shard_side(shape: tuple[int, ...], shards: int) -> int:
    """The dimension by which to cut a parameter: the longer side of a matrix, where the factors are smallest.

    It is the paper's choice (E.2): by outputs, but the second matrix of the MLP by inputs. FSDP2 cuts another
    dimension than the first only evenly, so what does not divide is cut by the first.
    """
    return int(len(shape) == 2 and shape[1] > shape[0] and shape[1] % shards == 0)

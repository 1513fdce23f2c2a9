"""What the processes of one training say to each other besides gradients: small things, on the CPU, over gloo."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """The processes of a training; without torch.distributed, this one alone.

    Each instance is a channel of its own, so that a thread may speak while the training does. All processes make
    their instances in the same order.
    """

    def __init__(self):
        there = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size() if there else 1
        self.rank = dist.get_rank() if there else 0
        self.group = dist.new_group(backend="gloo") if there else None

    def highest(self, value: int) -> int:
        """The highest value that any process gives."""
        if self.world == 1:
            return value
        highest = torch.tensor(value)
        dist.all_reduce(highest, dist.ReduceOp.MAX, self.group)
        return int(highest)

    def together(self, function: Callable[[], T]) -> list[T]:
        """What the function gives in each process; an error in one is raised in all, once all are through."""
        outcome: tuple[Any, Exception | None]
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, error
        outcomes: list[Any] = [outcome] * self.world
        if self.world > 1:
            dist.all_gather_object(outcomes, outcome, self.group)
        if outcome[1]:
            raise outcome[1]
        for _, error in outcomes:
            if error:
                raise error
        return [result for result, _ in outcomes]

    def first(self, function: Callable[[], T]) -> T:
        """Runs the function in the first process; its result, or its error, is every process's."""
        return self.together(lambda: function() if self.rank == 0 else None)[0]

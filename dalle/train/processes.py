"""Several processes, as torchrun starts them, that share work without training together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """Which of how many this one is."""

    rank: int = 0
    count: int = 1

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order of rank, in every process."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def device(self, device: torch.device) -> torch.device:
        """Each process of a machine has a GPU of its own, if there are GPUs."""
        if self.count > 1 and device.type == "cuda" and device.index is None:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return device


@contextmanager
def processes() -> Iterator[Processes]:
    """Joins the processes that torchrun started, over gloo; alone there is nothing to join."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    dist.init_process_group(
        "gloo", timeout=timedelta(days=7)
    )  # shares of the work may take hours longer than others
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()

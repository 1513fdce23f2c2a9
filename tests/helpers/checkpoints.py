"""Checkpoints written at once, and damaged, for tests."""

from pathlib import Path
from typing import Any

from dalle.train.checkpoint import Snapshot, write_checkpoint
from dalle.train.distributed import Distributed
from dalle.train.state import TrainState


def save_checkpoint(run_dir: Path, state: TrainState, meta: dict[str, Any], keep: int = 1) -> Path:
    """A checkpoint of the state; all processes call it together."""
    dist = Distributed.current()
    return write_checkpoint(run_dir, Snapshot.of(state, meta, dist.rank), keep, None, dist)


def flip(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)

"""Sharded checkpoints by torch.distributed.checkpoint (DCP), in safetensors and without pickle.

    step-00001000/model/shard-00001-model-00001-of-00001.safetensors    rank 0's shards
                  model/shard-00002-...                                 rank 1's
                  ema/  optimizer/  ...                                 likewise

DCP's default storage pickles its metadata; its safetensors storage keeps the place of each shard in the
file's header. Any number of processes can read them, and files of whole tensors too.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from dalle.io.files import read_tensors, sync_folder
from dalle.train.distributed import Distributed


class _FileOrFolder(FileSystem):
    """A single file is listed as a folder that holds it."""

    def ls(self, path: Any) -> list[str]:
        return [str(path)] if Path(path).is_file() else super().ls(path)


def copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of this process's shards on the CPU."""
    return BlockingAsyncStager().stage({name: tensor.detach() for name, tensor in tensors.items()})


def write_shards(folder: Path, tensors: dict[str, Tensor], dist: Distributed) -> list[Path]:
    """Writes each process's shards; returns this process's files. OSError in all when one cannot write."""
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _first_error():
        dcp.save(tensors, storage_writer=writer, process_group=dist.control, no_dist=dist.control is None)
    if dist.is_main:
        sync_folder(folder)
    return sorted(folder.glob(f"shard-{dist.rank + 1:05d}-*.safetensors"))


def find(folder: Path, name: str) -> Path | None:
    """The file or folder of shards in which a checkpoint keeps tensors, or None."""
    places = folder / f"{name}.safetensors", folder / name
    return next((place for place in places if place.exists()), None)


def read_shapes(place: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor of a file or a folder of shards, by name."""
    metadata = _reader(place).read_metadata().state_dict_metadata
    return {
        name: (info.size, info.properties.dtype)
        for name, info in metadata.items()
        if isinstance(info, TensorStorageMetadata)
    }


def read_into(place: Path, tensors: dict[str, Tensor], dist: Distributed | None = None) -> None:
    """Fills tensors, whole or sharded, in place; all processes call it together."""
    group = dist.control if dist else None
    with _first_error(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=_reader(place), process_group=group, no_dist=group is None)


def read_whole(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors that a checkpoint keeps under a name, unsharded; ValueError if there are none."""
    place = find(folder, name)
    if place is None or place.is_file():
        return read_tensors(folder / f"{name}.safetensors")
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in read_shapes(place).items()}
    read_into(place, tensors)
    return tensors


def _reader(place: Path) -> dcp.HuggingFaceStorageReader:
    reader = dcp.HuggingFaceStorageReader(str(place))
    reader.fs = _FileOrFolder()
    return reader


@contextmanager
def _first_error() -> Iterator[None]:
    """Raises the first failing process's own error in place of DCP's exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None

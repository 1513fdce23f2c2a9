"""Checkpoints whose tensors lie on many processes, by torch.distributed.checkpoint (DCP).

    step-00001000/model/shard-00001-model-00001-of-00001.safetensors    what the first process holds
                  model/shard-00002-...                                 the second
                  ema/  optimizer/  ...                                 likewise

DCP's default storage pickles its `.metadata` and whatever is no tensor. This uses its safetensors storage, in
which
the header of each shard says where its tensors belong, and hands it nothing but tensors: nothing is unpickled
from a file. Which number of processes reads does not matter, nor whether a tensor was written whole
(`model.safetensors`).
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
from torch.distributed.tensor import DeviceMesh, DTensor, Shard

from dalle.io.files import read_tensors, sync_folder
from dalle.train.distributed import Distributed


class _OneOrAll(FileSystem):
    """A folder's files, or one file in place of a folder."""

    def ls(self, path: Any) -> list[str]:
        return [str(path)] if Path(path).is_file() else super().ls(path)


def is_sharded(tensors: dict[str, Tensor]) -> bool:
    """Whether any of them lies on more than one process."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def of_each_process(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """What every process has a value of its own of, as one tensor (processes, ...) to put into a
    checkpoint."""
    return DTensor.from_local(tensor.detach()[None], mesh, [Shard(0)] * mesh.ndim, run_check=False)


def copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of this process's shares in the CPU's memory."""
    return BlockingAsyncStager().stage({name: tensor.detach() for name, tensor in tensors.items()})


def write_shards(folder: Path, tensors: dict[str, Tensor], dist: Distributed) -> list[Path]:
    """Writes what all processes hold, each its share; returns this process's files.

    Raises:
        OSError: in all processes, when one of them cannot write.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _plain_errors():
        dcp.save(tensors, storage_writer=writer, process_group=dist.control, no_dist=dist.control is None)
    if dist.rank == 0:
        sync_folder(folder)
    return sorted(folder.glob(f"shard-{dist.rank + 1:05d}-*.safetensors"))


def find(folder: Path, name: str) -> Path | None:
    """Where a checkpoint keeps tensors: a file, a folder of shards, or None if it has no such tensors."""
    places = folder / f"{name}.safetensors", folder / name
    return next((place for place in places if place.exists()), None)


def look_up(place: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor of a file or of a folder of shards, by name."""
    found = _reader(place).read_metadata().state_dict_metadata
    return {
        name: (info.size, info.properties.dtype)
        for name, info in found.items()
        if isinstance(info, TensorStorageMetadata)
    }


def read_into(place: Path, tensors: dict[str, Tensor], dist: Distributed | None = None) -> None:
    """Fills tensors, whole ones and shares, in place; processes, if there are several, together."""
    group = dist.control if dist else None
    with _plain_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # being alone is no fault
        dcp.load(tensors, storage_reader=_reader(place), process_group=group, no_dist=group is None)


def read_whole(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors that a checkpoint keeps under a name, each whole; ValueError if there are none."""
    place = find(folder, name)
    if place is None or place.is_file():
        return read_tensors(folder / f"{name}.safetensors")
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in look_up(place).items()}
    read_into(place, tensors)
    return tensors


def _reader(place: Path) -> dcp.HuggingFaceStorageReader:
    reader = dcp.HuggingFaceStorageReader(str(place))
    reader.fs = _OneOrAll()
    return reader


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The first failing process's error in place of DCP's collection of them."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None

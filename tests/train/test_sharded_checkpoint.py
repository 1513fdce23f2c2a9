"""Sharded checkpoints: written and read by other numbers of processes, and damaged."""

import math
import os
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dalle.config import to_dict
from dalle.hub.registry import load_model
from dalle.io.files import verify_checksums, write_tensors
from dalle.train import sharded_checkpoint as sharded
from dalle.train.checkpoint import latest_checkpoint, restore, verify_checkpoint
from dalle.train.checkpoint_saver import AsyncCheckpointer
from dalle.train.config import EMAConfig, OptimizerConfig
from dalle.train.distributed import Distributed
from dalle.train.optimizer import build_optimizers
from dalle.train.state import EMA, TrainState
from dalle.transformer import Transformer, TransformerConfig
from tests.helpers.checkpoints import flip, save_checkpoint
from tests.helpers.hostile import Call
from tests.helpers.processes import run_group

CONFIG = TransformerConfig(1, 1, 6, 3, (3, 3), 5, 7, conv_kernel=3)
META = {"kind": "transformer", "model_config": to_dict(CONFIG), "config": {}, "inputs": {}}
SECOND_SHARD = "shard-00002-model-00001-of-00001.safetensors"


def state_of(seed: int, shape: tuple[int, ...] = ()) -> TrainState:
    """A fresh state, sharded over a mesh of that shape."""
    torch.manual_seed(seed)
    model = Transformer(CONFIG)
    if shape:
        names = ("replicate", "shard")[-len(shape) :]
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return TrainState(model, build_optimizers(model, OptimizerConfig()), EMA(model, EMAConfig(0.5, 1)))


def one_update(state: TrainState, seed: int) -> None:
    """A gradient that does not depend on the sharding, and an update."""
    torch.manual_seed(seed)
    for parameter in state.model.parameters():
        whole = torch.randn(parameter.shape)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.grad = whole
    for optimizer in state.optimizers:
        optimizer.step()
    state.step += 1
    state.ema.update(state.model, state.step)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def contents(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of a state, whole."""
    tensors, _ = state.state_dict()
    return {f"{file}/{name}": whole(t) for file, part in tensors.items() for name, t in part.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained(rank: int, run: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """Two updates, then a checkpoint in the background while a third is made; what it must hold."""
    state = state_of(0, shape)
    one_update(state, 1)
    one_update(state, 2)
    saver = AsyncCheckpointer(run, keep_last=2, keep_every=None)
    saver.save(state, META)
    expected = contents(state)
    one_update(state, 3)
    saver.wait()
    return expected


def resumed(rank: int, run: Path, shape: tuple[int, ...]) -> tuple[dict[str, Any], int]:
    """What a state of other weights holds after taking up the run."""
    state = state_of(9, shape)
    ranks = Distributed.current()
    restore(latest_checkpoint(run, None, ranks), state, ranks)
    for optimizer in state.optimizers:
        for parameter, moments in optimizer.state.items():
            assert type(moments["exp_avg"]) is type(parameter.data)
    found = contents(state)
    one_update(state, 3)  # goes on
    return found, state.step


def run_with(shape: tuple[int, ...], function: Callable[..., Any], run: Path) -> Any:
    """The function in as many processes as the mesh has; in this one for no mesh."""
    return run_group(math.prod(shape), function, run, shape)[0] if shape else function(0, run, ())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[tuple[int, ...]], tuple[Path, dict[str, Any]]]:
    """saved(mesh): (a run by that many processes, what its checkpoint holds)."""

    @cache
    def save(shape: tuple[int, ...]) -> tuple[Path, dict[str, Any]]:
        run = tmp_path_factory.mktemp("run")
        return run, run_with(shape, trained, run)

    return save


@pytest.mark.parametrize(
    ("writers", "readers"),
    [
        ((2,), ()),
        ((), (2,)),
        ((2, 2), (2,)),
        pytest.param((2,), (4,), marks=pytest.mark.slow),
        pytest.param((2,), (2, 2), marks=pytest.mark.slow),
    ],
)
def test_another_number_of_processes_takes_up_a_run(writers, readers, saved):
    """Bit for bit, also between fsdp and none, and between hsdp and fsdp."""
    run, expected = saved(writers)
    found, step = run_with(readers, resumed, run)
    assert same(found, expected)
    assert step == 3


def test_shards_are_safetensors_of_which_each_process_writes_its_share(saved):
    run, expected = saved((2,))
    folder = run / "checkpoints" / "step-00000002"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = [SECOND_SHARD.replace("2", "1", 1), SECOND_SHARD]
    shards = [f"{part}/{file}" for part in ("ema", "model", "optimizer") for file in files]
    assert names == ["SHA256SUMS", *shards[:2], "meta.json", *shards[2:]]
    sizes = [sum(t.numel() for t in load_file(folder / shard).values()) for shard in shards[2:4]]
    assert sum(sizes) == sum(tensor.numel() for name, tensor in expected.items() if name.startswith("model/"))
    assert max(sizes) < 0.7 * sum(sizes)


def test_a_sharded_checkpoint_is_loaded_and_exported_as_one_file(saved, tmp_path):
    run, expected = saved((2,))
    raw, averaged = (load_model(run, "transformer", averaged=averaged).model for averaged in (False, True))
    write_tensors(tmp_path / "one.safetensors", raw.state_dict())
    exported = {f"model/{name}": t for name, t in load_file(tmp_path / "one.safetensors").items()}
    assert same(exported, {name: tensor for name, tensor in expected.items() if name.startswith("model/")})
    torch.testing.assert_close(averaged.to_logits.weight.data, expected["ema/to_logits.weight"] / 0.75)


PLACEMENTS = {
    "rows": [Shard(0), Replicate()],
    "columns": [Replicate(), Shard(1)],
    "blocks": [Shard(0), Shard(1)],
    "rows twice": [Shard(0), Shard(0)],
    "everywhere": [Replicate(), Replicate()],
}
SHAPES = [(5, 7), (4, 4), (1, 1), (3, 1)]


def value(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)


PLAIN = {"number": torch.tensor(3.0), "counts": torch.tensor([1, 2]), "half": value((5, 7)).bfloat16()}


def placed(rank: int, folder: Path) -> bool:
    mesh = init_device_mesh("cpu", (2, 2))
    tensors: dict[str, Tensor] = {
        f"{name} {shape}": distribute_tensor(value(shape), mesh, placements)
        for name, placements in PLACEMENTS.items()
        for shape in SHAPES
    }
    tensors |= PLAIN | {"half": distribute_tensor(PLAIN["half"], mesh, [Shard(0), Shard(1)])}
    sharded.write_shards(folder, sharded.copy_to_cpu(tensors), Distributed.current())
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    sharded.read_into(folder, other, Distributed.current())
    return all(torch.equal(whole(tensors[name]), whole(other[name])) for name in tensors)


def test_any_placement_is_written_and_read(tmp_path):
    """Uneven and empty shares too, single numbers, integers and bf16."""
    assert run_group(4, placed, tmp_path / "part") == [True] * 4
    expected = {f"{name} {shape}": value(shape) for name in PLACEMENTS for shape in SHAPES}
    assert same(sharded.read_whole(tmp_path, "part"), expected | PLAIN)


def test_a_hostile_metadata_file_runs_nothing(saved, tmp_path):
    """DCP's default reader would unpickle it: shown first, so that the trap is known to work."""
    mark = tmp_path / "ran"
    run, expected = saved((2,))
    folder = shutil.copytree(run, tmp_path / "run") / "checkpoints" / "step-00000002"
    for place in (".", "model", "ema", "optimizer"):
        (folder / place / ".metadata").write_bytes(pickle.dumps(Call(Path.touch, mark)))
    with pytest.raises(BaseException, match=r".*"):
        torch.distributed.checkpoint.FileSystemReader(folder / "model").read_metadata()
    assert mark.exists()
    mark.unlink()
    for readers in ((), (2,)):
        assert same(run_with(readers, resumed, tmp_path / "run")[0], expected)
    sharded.read_whole(folder, "model")
    assert not mark.exists()


def damaged_shard(rank: int, run: Path, shape: tuple[int, ...]) -> tuple[str, int]:
    """Two checkpoints; the second shard of the newer is damaged, and every process takes the older one."""
    state = state_of(0, shape)
    for seed in (1, 2):
        one_update(state, seed)
        folder = save_checkpoint(run, state, META, keep=2)
    ranks = Distributed.current()
    if rank == 0:
        flip(folder / "optimizer" / SECOND_SHARD)
    dist.barrier()
    found = latest_checkpoint(run, None, ranks)
    restore(found, state, ranks)
    return found.name, state.step


def test_a_flipped_bit_in_one_shard_makes_all_processes_take_the_checkpoint_before(tmp_path):
    assert run_group(2, damaged_shard, tmp_path, (2,)) == [("step-00000001", 1)] * 2
    assert "optimizer/shard-00002" in verify_checkpoint(tmp_path / "checkpoints" / "step-00000002")


def test_a_shard_too_many_or_too_few_is_named(saved, tmp_path):
    folder = shutil.copytree(saved((2,))[0], tmp_path / "run") / "checkpoints" / "step-00000002"
    extra = folder / "model" / SECOND_SHARD.replace("2", "3", 1)
    write_tensors(extra, {"a": torch.zeros(1)})
    assert "shard-00003" in verify_checksums(folder)
    extra.unlink()
    (folder / "model" / SECOND_SHARD).unlink()
    assert f"{SECOND_SHARD} cannot be read" in verify_checksums(folder)


def cannot_write(rank: int, run: Path, shape: tuple[int, ...]) -> str:
    """The second process's disk is full; every process raises it, and the first checkpoint stays."""
    state = state_of(0, shape)
    one_update(state, 1)
    saver = AsyncCheckpointer(run, keep_last=1, keep_every=None)
    saver.save(state, META)
    saver.wait()
    one_update(state, 2)
    if rank == 1:
        full = Mock(side_effect=OSError(28, os.strerror(28)))
        torch.distributed.checkpoint.filesystem.FileSystem.create_stream = full
    saver.save(state, META)
    with pytest.raises(OSError) as error:  # noqa: PT011 - its text is returned
        saver.wait()
    return error.value.strerror


def test_a_full_disk_of_one_process_is_raised_in_all(tmp_path):
    errors = run_group(2, cannot_write, tmp_path, (2,))
    assert errors[0] == errors[1]
    assert "cannot write the checkpoint of step 2 (No space left on device)" in errors[0]
    assert "step-00000001 is intact" in errors[0]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]

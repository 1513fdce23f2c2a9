"""Checkpoints: a folder that describes itself, written so that a crash never leaves half of one.

    run/checkpoints/step-00001000/model.safetensors      weights
                                  ema.safetensors        running sums of the averaged weights
                                  optimizer.safetensors  the optimizers' moments, "parameter/moment"
                                  scales.safetensors     gradient scales, with fp16 only
                                  NAME.safetensors       whatever else has a memory
                                  meta.json              format, kind, model_config, config, step, ema,
                                  inputs, ... SHA256SUMS             of all of these, written last
    run/checkpoints/latest                               name of the newest complete folder

A folder is written under another name, synced, renamed; the pointer moves last. What lies on many processes
is a folder of shards in place of a file (dalle/train/sharded_checkpoint.py). Random numbers, the learning
rate and the place in the data follow from the seed and the step.
"""

import os
import shutil
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dalle.io.files import (
    file_hashes,
    on_cpu,
    read_json,
    read_tensors,
    sync_folder,
    verify_checksums,
    write_checksums,
    write_json,
    write_tensors,
    write_text,
)
from dalle.io.format import FORMAT
from dalle.train import sharded_checkpoint as sharded
from dalle.train.distributed import Distributed
from dalle.train.state import TrainState


@dataclass(frozen=True)
class Snapshot:
    """A state as it was at one step, in the CPU's memory: what may be written while training goes on."""

    tensors: dict[str, dict[str, Tensor]]
    """This process's, by file and name."""
    meta: dict[str, Any]
    """What meta.json will hold."""

    @classmethod
    def of(cls, state: TrainState, meta: dict[str, Any], rank: int = 0) -> "Snapshot":
        """Copies this process's share of the state; what all processes have alike is the first one's."""
        tensors, numbers = state.state_dict()
        copies = {
            file: sharded.copy_to_cpu(held) if sharded.is_sharded(held) else on_cpu(held) if rank == 0 else {}
            for file, held in tensors.items()
        }
        return cls(copies, deepcopy({"format": FORMAT, **meta, **numbers}))

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"step-{self.meta['step']:08d}"


def save_checkpoint(
    run_dir: Path, state: TrainState, meta: dict[str, Any], keep: int, keep_every: int | None = None
) -> Path:
    """Writes a checkpoint of the state and removes all but the newest `keep` and every `keep_every`-th
    step's."""
    dist = Distributed.current()
    return write_checkpoint(run_dir, Snapshot.of(state, meta, dist.rank), keep, keep_every, dist)


def write_checkpoint(
    run_dir: Path, snapshot: Snapshot, keep: int, keep_every: int | None, dist: Distributed
) -> Path:
    """`save_checkpoint` of a snapshot; all processes call it together.

    Raises:
        OSError: the disk is full, or cannot be written to; earlier checkpoints are as they were.
    """
    root = run_dir / "checkpoints"
    partial = root / f".partial-{snapshot.name}"
    try:
        dist.on_main(lambda: _clear(root, partial))
        sums = _write_tensors(partial, snapshot, dist)
        dist.on_main(lambda: _complete(partial, snapshot, sums))
    except OSError:
        shutil.rmtree(
            partial, ignore_errors=True
        )  # half a checkpoint is of use to no one, and the room may be
        raise
    dist.on_main(lambda: _remove_older(root, snapshot, keep, keep_every))
    return root / snapshot.name


def _clear(root: Path, partial: Path) -> None:
    """Takes away what earlier crashes left, and makes the folder to write in."""
    for left in root.glob(".partial-step-*"):
        shutil.rmtree(left)
    partial.mkdir(parents=True)


def _write_tensors(partial: Path, snapshot: Snapshot, dist: Distributed) -> dict[str, str]:
    """Writes every tensor; sha256 of each file, those of other processes too."""
    written: list[Path] = []
    for file, tensors in snapshot.tensors.items():
        if sharded.is_sharded(tensors):
            written += sharded.write_shards(partial / file, tensors, dist)
        else:
            path = partial / f"{file}.safetensors"
            dist.on_main(lambda path=path, tensors=tensors: write_tensors(path, tensors, copy=False))
            written += [path] if dist.rank == 0 else []
    return {
        name: digest
        for sums in dist.gather_results(lambda: file_hashes(partial, written))
        for name, digest in sums.items()
    }


def _complete(partial: Path, snapshot: Snapshot, sums: dict[str, str]) -> None:
    """Meta and hashes, then the rename, then the pointer."""
    folder = partial.with_name(snapshot.name)
    write_json(partial / "meta.json", snapshot.meta)
    write_checksums(partial, sums | file_hashes(partial, [partial / "meta.json"]))
    sync_folder(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    sync_folder(folder.parent)
    write_text(folder.with_name("latest"), folder.name)


def _remove_older(root: Path, snapshot: Snapshot, keep: int, keep_every: int | None) -> None:
    older = [folder for folder in _steps(root) if folder.name < snapshot.name]
    for folder in older[: max(0, len(older) + 1 - keep)]:
        if not keep_every or int(folder.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(folder)


def _steps(root: Path) -> list[Path]:
    """The checkpoints there are, oldest first."""
    return sorted(folder for folder in root.glob("step-*") if folder.name.removeprefix("step-").isdigit())


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not (folder / "meta.json").is_file():
        raise ValueError(
            f"{pointer} names {folder.name}, which is not there; restore it or remove {pointer.parent}"
        )
    return folder


def latest_valid_checkpoint(run_dir: Path, dist: Distributed) -> Path | None:
    """The newest checkpoint of a run whose files are all as they were written, or None if it has none at all.

    Says which file is damaged when it takes an earlier one. All processes call it together, each reads its
    share.

    Raises:
        ValueError: there are checkpoints, and each is damaged.
    """
    damages: list[str] = []
    for folder in dist.on_main(lambda: _candidates(run_dir)):
        found = dist.gather_results(
            lambda folder=folder: verify_checkpoint(folder, dist.rank, dist.world_size)
        )
        if not any(found):
            if damages and dist.rank == 0:
                tqdm.write(f"warning: {'; '.join(damages)}; taking {folder.name}, the newest that is whole")
            return folder
        damages.append(next(filter(None, found)))
    if damages:
        raise ValueError(
            f"no checkpoint of {run_dir} is whole: {'; '.join(damages)}. Restore one, or give another --out"
        )
    return None


def _candidates(run_dir: Path) -> list[Path]:
    """What the pointer names, then what is older; without a pointer, whatever there is."""
    root = run_dir / "checkpoints"
    pointer = root / "latest"
    newest = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
    if newest is None:
        return _steps(root)[::-1]
    return [root / newest, *(folder for folder in _steps(root)[::-1] if folder.name < newest)]


def verify_checkpoint(
    folder: Path, rank: int = 0, world: int = 1, parts: tuple[str, ...] | None = None
) -> str | None:
    """What is wrong with the files of a checkpoint, in a sentence, or None; `parts` limits it to some
    tensors."""
    try:
        read_json(folder / "meta.json")
    except ValueError as error:
        return str(error)
    files = ("meta.json", *(f"{part}{end}" for part in parts or () for end in (".safetensors", "/")))
    return verify_checksums(folder, lambda name: parts is None or name.startswith(files), rank, world)


def restore(folder: Path, state: TrainState, dist: Distributed | None = None) -> None:
    """Puts a checkpoint's weights, moments, averages and step into the state; strict.

    However many processes wrote it, and however many read it; these call it together.

    Raises:
        ValueError: a file is missing or no safetensors file, or holds other tensors than the state.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    held, _ = state.state_dict()
    spread = any(
        map(sharded.is_sharded, held.values())
    )  # the moments to come too, of which a fresh state has none
    for file in held:
        place = sharded.find(folder, file)
        if place is None and file not in ("model", "ema", "optimizer"):
            continue  # new to the run
        if place and (place.is_dir() or spread):
            tensors[file] = state.empty_like(held, file, sharded.look_up(place))
            sharded.read_into(place, tensors[file], dist)
        else:
            tensors[file] = read_tensors(folder / f"{file}.safetensors")
    state.load(tensors, read_json(folder / "meta.json"), folder)


def saved_at(folder: Path) -> str:
    """When a checkpoint was written: local time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((folder / "meta.json").stat().st_mtime))

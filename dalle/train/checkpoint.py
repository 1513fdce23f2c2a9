"""Checkpoints: directories that describe themselves, written so that a crash never leaves half of one.

    run/checkpoints/step-00001000/model.safetensors      weights
                                  ema.safetensors        running sums of the averaged weights
                                  optimizer.safetensors  the optimizers' moments, "parameter/moment"
                                  scales.safetensors     gradient scales, with fp16 only
                                  meta.json              format, kind, model_config, config, inputs, step, ...
                                  SHA256SUMS             of all of these, written last
    run/checkpoints/latest                               name of the newest complete checkpoint

A checkpoint is written under another name, synced, renamed; the pointer moves last. Sharded tensors are a
folder of shards in place of a file (dalle/train/sharded_checkpoint.py).
"""

import os
import re
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dalle.io.files import (
    FORMAT,
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
from dalle.train import sharded_checkpoint as sharded
from dalle.train.distributed import Distributed, is_dtensor
from dalle.train.state import TrainState

NAME = re.compile(r"step-\d+")


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state on the CPU, to be written while training continues."""

    tensors: dict[str, dict[str, Tensor]]
    """This process's, by file and name."""
    meta: dict[str, Any]
    """Contents of meta.json."""

    @classmethod
    def of(cls, state: TrainState, meta: dict[str, Any], rank: int) -> "Snapshot":
        """Copies this process's shards of the state; replicated tensors on rank 0 only."""
        tensors, numbers = state.state_dict()
        copies = {}
        for file, values in tensors.items():
            if any(map(is_dtensor, values.values())):
                copies[file] = sharded.copy_to_cpu(values)
            else:
                copies[file] = on_cpu(values) if rank == 0 else {}
        return cls(copies, deepcopy({"format": FORMAT, **meta, **numbers}))

    @property
    def name(self) -> str:
        """Name of the checkpoint's directory."""
        return f"step-{self.meta['step']:08d}"


def write_checkpoint(
    run_dir: Path, snapshot: Snapshot, keep: int, keep_every: int | None, dist: Distributed
) -> Path:
    """Writes a checkpoint; removes all but the newest `keep` and every `keep_every`-th step's; collective.

    OSError if the disk is full or cannot be written to; earlier checkpoints are as they were.
    """
    root = run_dir / "checkpoints"
    partial = root / f".partial-{snapshot.name}"

    def clear() -> None:
        for leftover in root.glob(".partial-step-*"):
            shutil.rmtree(leftover)
        root.mkdir(exist_ok=True)
        partial.mkdir()

    try:
        dist.on_main(clear)
        hashes = _write_tensors(partial, snapshot, dist)
        dist.on_main(lambda: _complete(partial, snapshot, hashes))
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    dist.on_main(lambda: _remove_older(root, snapshot, keep, keep_every))
    return root / snapshot.name


def _write_tensors(partial: Path, snapshot: Snapshot, dist: Distributed) -> dict[str, str]:
    """Writes every tensor; sha256 of each file of all processes."""
    written: list[Path] = []
    for file, tensors in snapshot.tensors.items():
        if any(map(is_dtensor, tensors.values())):
            written += sharded.write_shards(partial / file, tensors, dist)
        else:
            path = partial / f"{file}.safetensors"
            dist.on_main(lambda path=path, tensors=tensors: write_tensors(path, tensors, copy=False))
            written += [path] if dist.is_main else []
    by_process = dist.gather_results(lambda: file_hashes(partial, written))
    return {name: digest for hashes in by_process for name, digest in hashes.items()}


def _complete(partial: Path, snapshot: Snapshot, hashes: dict[str, str]) -> None:
    """Meta and hashes, then the rename, then the pointer."""
    folder = partial.with_name(snapshot.name)
    write_json(partial / "meta.json", snapshot.meta)
    write_checksums(partial, hashes | file_hashes(partial, [partial / "meta.json"]))
    sync_folder(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    sync_folder(folder.parent)
    write_text(folder.with_name("latest"), folder.name)


def _remove_older(root: Path, snapshot: Snapshot, keep: int, keep_every: int | None) -> None:
    older = [folder for folder in _checkpoints(root) if folder.name < snapshot.name]
    for folder in older[: max(0, len(older) + 1 - keep)]:
        if not keep_every or int(folder.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(folder)


def _checkpoints(root: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    return sorted(folder for folder in root.iterdir() if NAME.fullmatch(folder.name)) if root.is_dir() else []


def latest_checkpoint(
    run_dir: Path, parts: tuple[str, ...] | None = ("model", "ema"), dist: Distributed | None = None
) -> Path | None:
    """The newest whole checkpoint of a run, or None if there are no checkpoints.

    It is whole if meta.json and the tensors of `parts` (None: of all) match their hashes. Warns of damaged
    files when it takes an earlier one; ValueError if all are damaged. With `dist` all processes call it
    together; each reads its share.
    """
    dist, damages = dist or Distributed(), []
    for folder in dist.on_main(lambda: _candidates(run_dir / "checkpoints")):
        errors = dist.gather_results(
            lambda folder=folder: verify_checkpoint(folder, dist.rank, dist.world_size, parts)
        )
        if not any(errors):
            if damages and dist.is_main:
                tqdm.write(f"warning: {'; '.join(damages)}; taking {folder.name}, the newest that is whole")
            return folder
        damages.append(next(filter(None, errors)))
    if damages:
        raise ValueError(f"no checkpoint of {run_dir} is whole: {'; '.join(damages)}; give another --out")
    return None


def _candidates(root: Path) -> list[Path]:
    """The checkpoint that `latest` names, older ones, then those a crash left ahead; each newest first."""
    try:
        newest = (root / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # lost or damaged
        newest = ""
    named = [root / newest] if NAME.fullmatch(newest) else []
    order = {folder: (folder.name <= newest, folder.name) for folder in [*named, *_checkpoints(root)]}
    return sorted(order, key=order.__getitem__, reverse=True)


def verify_checkpoint(
    folder: Path, rank: int = 0, world: int = 1, parts: tuple[str, ...] | None = None
) -> str | None:
    """What is wrong with a checkpoint's files, or None; `parts` limits the check to some tensor files."""
    try:
        read_json(folder / "meta.json")
    except ValueError as error:
        return str(error)
    files = ("meta.json", *(f"{part}{end}" for part in parts or () for end in (".safetensors", "/")))
    return verify_checksums(folder, lambda name: parts is None or name.startswith(files), rank, world)


def restore(folder: Path, state: TrainState, dist: Distributed | None = None) -> None:
    """Loads a checkpoint into the state; any number of processes may have written it.

    ValueError for a file that is missing, no safetensors file, or holds other tensors than the state.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    own, _ = state.state_dict()
    any_sharded = any(is_dtensor(tensor) for tensors in own.values() for tensor in tensors.values())
    for file in own:
        place = sharded.find(folder, file)
        if place is None and file not in ("model", "ema", "optimizer"):
            continue  # new to the run
        if place and (place.is_dir() or any_sharded):
            tensors[file] = state.targets(own, file, sharded.read_shapes(place))
            sharded.read_into(place, tensors[file], dist)
        else:
            tensors[file] = read_tensors(folder / f"{file}.safetensors")
    state.load(tensors, read_json(folder / "meta.json"), folder)

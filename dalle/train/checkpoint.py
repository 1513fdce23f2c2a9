"""Checkpoints: a folder that describes itself, written so that a crash never leaves half of one.

    run/checkpoints/step-00001000/model.safetensors      weights
                                  ema.safetensors        running sums of the averaged weights
                                  optimizer.safetensors  the optimizers' moments, "parameter/moment"
                                  scales.safetensors     gradient scales, with fp16 only
                                  meta.json              format, kind, config, run, step, ema, links
    run/checkpoints/latest                               name of the newest complete folder

A folder is written under another name, synced, renamed; the pointer moves last.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from dalle.files import read_json, read_tensors, sync_folder, write_json, write_tensors, write_text
from dalle.train.state import TrainState

FORMAT = 2  # 1 had the transformer's norms beside its resblocks


def save_checkpoint(run_dir: Path, state: TrainState, meta: dict[str, Any], keep: int, write: bool = True) -> Path:
    """Writes a checkpoint of the state and removes all but the newest `keep`.

    Of several processes each must call it, since sliced tensors are gathered, and one only may `write`.
    """
    root = run_dir / "checkpoints"
    name = f"step-{state.step:08d}"
    tensors_by_file = state.tensors()
    if not write:
        return root / name
    partial = root / f".partial-{name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, tensors in tensors_by_file.items():
        write_tensors(partial / f"{file}.safetensors", tensors)
    write_json(partial / "meta.json", {"format": FORMAT, **meta, **state.numbers()})
    sync_folder(partial)
    shutil.rmtree(root / name, ignore_errors=True)
    os.replace(partial, root / name)
    sync_folder(root)
    write_text(root / "latest", name)
    older = sorted(folder for folder in root.glob("step-*") if folder.name < name)
    for old in older[: max(0, len(older) + 1 - keep)]:
        shutil.rmtree(old)
    return root / name


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not (folder / "meta.json").is_file():
        raise ValueError(f"{pointer} names {folder.name}, which is not there; restore it or remove {pointer.parent}")
    return folder


def check_meta(meta: Any, kind: str, source: Path) -> None:
    """ValueError unless a description is of this kind and of a format we read."""
    found = meta.get("kind") if isinstance(meta, dict) else None
    if found != kind:
        raise ValueError(f"{source} holds {found or 'something unknown'!r}, expected {kind!r}")
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{source} has format {meta.get('format')}, this version reads {FORMAT}; use the version that wrote it"
        )


def restore(folder: Path, state: TrainState) -> None:
    """Puts a checkpoint's weights, moments, averages and step into the state; strict."""
    tensors = {path.stem: read_tensors(path) for path in _files(folder, state)}
    state.load(tensors, read_json(folder / "meta.json"), folder)


def _files(folder: Path, state: TrainState) -> list[Path]:
    """Those that the state needs, there or not: reading names what is missing."""
    return [folder / f"{name}.safetensors" for name in state.tensors()]

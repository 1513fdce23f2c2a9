"""Checkpoints: a folder that describes itself, written so that a crash never leaves half of one.

    run/checkpoints/step-00001000/model.safetensors      weights
                                  ema.safetensors        running sums of the averaged weights
                                  optimizer.safetensors  the optimizers' moments, "parameter/moment"
                                  scales.safetensors     gradient scales, with fp16 only
                                  meta.json              format, kind, config, run, step, ema, links
    run/checkpoints/latest                               name of the newest complete folder

A folder is written under another name, synced, renamed; the pointer moves last.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle.train.ema import AveragedWeights, EMAConfig
from dalle.train.scaling import GradientScales

FORMAT = 2  # 1 had the transformer's norms beside its resblocks


@dataclass
class TrainState:
    """All that changes while training. Random numbers and data follow from seed and step."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    ema: AveragedWeights
    scales: GradientScales | None = None
    step: int = 0


def save_checkpoint(run_dir: Path, state: TrainState, meta: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint of the state and removes all but the newest `keep`."""
    root = run_dir / "checkpoints"
    name = f"step-{state.step:08d}"
    partial = root / f".partial-{name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    ema = {"decay": state.ema.config.decay, "every": state.ema.config.every, "updates": state.ema.updates}
    write_tensors(partial / "model.safetensors", state.model.state_dict())
    write_tensors(partial / "ema.safetensors", state.ema.sums)
    write_tensors(partial / "optimizer.safetensors", _optimizer_tensors(state))
    if state.scales:
        write_tensors(partial / "scales.safetensors", state.scales.state_dict())
    write_json(partial / "meta.json", {"format": FORMAT, **meta, "step": state.step, "ema": ema})
    _sync_folder(partial)
    shutil.rmtree(root / name, ignore_errors=True)
    os.replace(partial, root / name)
    _sync_folder(root)
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
    meta = read_json(folder / "meta.json")
    load_strict(state.model, read_tensors(folder / "model.safetensors"), folder)
    state.ema.config = EMAConfig(meta["ema"]["decay"], meta["ema"]["every"])
    state.ema.updates = meta["ema"]["updates"]
    for name, tensor in read_tensors(folder / "ema.safetensors").items():
        state.ema.sums[name].copy_(tensor)
    names = dict(state.model.named_parameters())
    owners = {p: o for o in state.optimizers for group in o.param_groups for p in group["params"]}
    for key, tensor in read_tensors(folder / "optimizer.safetensors").items():
        name, moment = key.rsplit("/", 1)
        parameter = names[name]
        like = tensor if moment == "step" else parameter  # the fused kernel wants the parameter's strides
        value = torch.empty_like(like, dtype=tensor.dtype, device=parameter.device)
        owners[parameter].state[parameter][moment] = value.copy_(tensor)
    if state.scales:
        state.scales.load_state_dict(read_tensors(folder / "scales.safetensors"))
    state.step = meta["step"]


def load_strict(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Weights into a model; ValueError that names the first missing, extra or misshapen tensor."""
    own = model.state_dict()
    if missing := sorted(own.keys() - tensors.keys()):
        raise ValueError(f"{source} lacks {len(missing)} tensors of the model, first {missing[0]!r}")
    if extra := sorted(tensors.keys() - own.keys()):
        raise ValueError(f"{source} holds {len(extra)} tensors the model lacks, first {extra[0]!r}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{source}: {name!r} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
    model.load_state_dict(tensors)


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        f"{names[parameter]}/{moment}": value
        for optimizer in state.optimizers
        for parameter, moments in optimizer.state.items()
        for moment, value in moments.items()
    }


def make_directory(folder: Path) -> Path:
    """The directory, made where there is none; ValueError where it cannot be, or cannot be written to."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may try at the same time
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); give another --out, or another path") from None
    return folder


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, on disk when this returns."""
    save_file({name: t.detach().contiguous().cpu().clone() for name, t in tensors.items()}, path)
    _sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; ValueError for one that is missing, truncated or something else."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"no file {path}; the checkpoint is incomplete") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None


def write_json(path: Path, data: Any) -> None:
    """JSON, on disk when this returns; never half a file."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """JSON; ValueError for a file that is missing or something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no file {path}; expected a run or model directory of this library") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def write_text(path: Path, text: str) -> None:
    """A text file replaced in one instant."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    os.replace(partial, path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

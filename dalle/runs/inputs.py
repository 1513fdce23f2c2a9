"""Inputs of a command: results of earlier stages under runs/."""

import os
from pathlib import Path
from typing import Any

import torch

from dalle.hub.registry import LoadedModel, load_model
from dalle.io.files import read_json
from dalle.pretrained.load import is_external_checkpoint, load_image_tokenizer
from dalle.runs import ROOT
from dalle.text import BPETokenizer, load_text_tokenizer
from dalle.train.checkpoint import latest_checkpoint
from dalle.types import ImageTokenizer

MAKE_COMMANDS = {
    "text": "python scripts/train_tokenizer.py --config configs/transformer/shapes.yaml",
    "dvae": "python scripts/train_dvae.py --config configs/dvae/shapes.yaml",
    "tokens": "python scripts/encode_images.py --config configs/dvae/shapes.yaml",
    "transformer": "python scripts/train_transformer.py --config configs/transformer/shapes.yaml",
    "clip": "python scripts/train_clip.py --config configs/clip/shapes.yaml",
    "base": "python scripts/train_diffusion.py --config configs/diffusion/shapes.yaml",
    "upsampler": "python scripts/train_diffusion.py --config configs/diffusion/upsampler-shapes.yaml",
}
MARKS = {stage: "checkpoints" for stage in MAKE_COMMANDS}
MARKS |= {"text": "text_tokenizer.json", "tokens": "meta.json"}
"""File or folder that marks a result of a stage."""


def is_complete(stage: str) -> bool:
    """Whether the newest result of a stage under runs/ is there and, if it is trained, trained to its end."""
    found = _results(stage)
    meta = _meta(stage, found[-1], ("model", "ema")) if found and stage != "text" else {}
    return bool(found) and meta.get("step", 0) >= meta.get("steps", 0)


def latest_run(stage: str) -> Path:
    """The newest result of a stage under runs/; ValueError names the command that makes one."""
    if found := _results(stage):
        return found[-1]
    raise ValueError(f"no {stage} under {ROOT}/; make one:\n    {MAKE_COMMANDS[stage]}")


def _results(stage: str) -> list[Path]:
    """Folders one or two levels below runs/ that hold a complete result of the stage, oldest first."""
    mark = MARKS[stage]
    marks = [*ROOT.glob(f"*/{mark}"), *ROOT.glob(f"*/*/{mark}")]
    marks.sort(key=lambda path: (path.stat().st_mtime, path))
    folders = [path.parent for path in marks if path.parent.name[0] != "."]
    if stage == "text":  # a model directory has a text_tokenizer.json too
        return [folder for folder in folders if not (folder / "config.json").exists()]
    return [folder for folder in folders if _meta(stage, folder).get("kind") == stage]


def _meta(stage: str, folder: Path, parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """meta.json of a token cache, or of a run's latest checkpoint (see there); empty if it is damaged."""
    try:
        checkpoint = None if stage == "tokens" else latest_checkpoint(folder, parts)
        return read_json((checkpoint or folder) / "meta.json")
    except (OSError, ValueError):
        return {}


def resolve_input(stage: str, given: Path | None) -> Path:
    """The path given, or the newest under runs/; says which it took."""
    path = given or latest_run(stage)
    if not os.path.exists(path):  # False also for a name that is too long
        raise ValueError(f"no {stage} at {path}; make one:\n    {MAKE_COMMANDS[stage]}")
    print(f"taking {stage} from {path}")
    return path


def load_stage(stage: str, given: Path | None, device: Any = "cpu") -> LoadedModel:
    """A model of an earlier stage, with its EMA weights, or a published image tokenizer as the dVAE.

    Prints a note if its training is not complete.
    """
    path = resolve_input(stage, given)
    if stage == "dvae" and is_external_checkpoint(path):
        return LoadedModel(stage, load_image_tokenizer(path, device), {}, path)
    part = load_model(path, stage, device)
    step, steps = part.meta.get("step"), part.meta.get("steps")
    if step is not None and step < steps:
        print(f"note: this {stage} was trained for {step} of {steps} steps only")
    return part


def load_dvae_input(given: Path | None, device: torch.device) -> tuple[ImageTokenizer, str]:
    """The image tokenizer of --dvae, and the hash of its weights."""
    part = load_stage("dvae", given, device)
    return part.model.to(memory_format=torch.channels_last), part.hash


def load_text_input(given: Path | None, text_vocab: int | None = None) -> BPETokenizer:
    """The text tokenizer of an earlier stage, or any file that `load_text_tokenizer` reads.

    ValueError if it has more ids than a model's `text_vocab`.
    """
    path = resolve_input("text", given)
    text = load_text_tokenizer(path / "text_tokenizer.json" if path.is_dir() else path)
    if text_vocab is not None and text.vocab_size > text_vocab:
        raise ValueError(f"the tokenizer has {text.vocab_size} ids, text_vocab is {text_vocab}; raise it")
    return text

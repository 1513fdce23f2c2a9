"""Inputs of a command: results of earlier stages under runs/, and the dataloader of a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dalle.data import BatchReader, ImageTextLoader
from dalle.hub.registry import LoadedModel, load_model
from dalle.io.files import make_directory, read_json
from dalle.pretrained.load import is_external_checkpoint, load_image_tokenizer
from dalle.runs.args import ROOT
from dalle.text import BPETokenizer, load_text_tokenizer
from dalle.train.precision import resolve_device
from dalle.types import ImageTokenizer

MAKE_COMMANDS = {
    "text": "python scripts/train_tokenizer.py --config configs/transformer/shapes.yaml",
    "dvae": "python scripts/train_dvae.py --config configs/dvae/shapes.yaml",
    "tokens": "python scripts/encode_images.py --config configs/dvae/shapes.yaml",
    "transformer": "python scripts/train_transformer.py --config configs/transformer/shapes.yaml",
    "clip": "python scripts/train_clip.py --config configs/clip/shapes.yaml",
}
_MARKS = {"text": "text_tokenizer.json", "tokens": "meta.json"}
"""File that marks a complete result; else the pointer to the latest checkpoint."""


def loader(
    reader: BatchReader, args: Any, out: Path, receive: Callable[[Any], Any] | None = None
) -> ImageTextLoader:
    """The dataloader of a training; <out>/bad_samples.jsonl names bad samples."""
    data = args.data
    log = make_directory(out) / "bad_samples.jsonl"
    pin = resolve_device(args.device).type == "cuda"
    return ImageTextLoader(
        reader, args.steps, data.workers, data.prefetch, log, data.max_bad_fraction, receive, pin
    )


def is_complete(stage: str, root: Path | None = None) -> bool:
    """Whether the newest result of a stage under runs/ is there and, if it is trained, trained to its end."""
    if not _results(stage, root or ROOT):
        return False
    pointer = latest_run(stage, root) / "checkpoints" / "latest"
    if not pointer.is_file():
        return True
    meta = read_json(pointer.parent / pointer.read_text(encoding="utf-8").strip() / "meta.json")
    return meta["step"] >= meta["steps"]


def latest_run(stage: str, root: Path | None = None) -> Path:
    """The newest result of a stage under runs/; ValueError names the command that makes one."""
    found = [path for path in _results(stage, root or ROOT)]
    if not found:
        raise ValueError(f"no {stage} under {root or ROOT}/; make one:\n    {MAKE_COMMANDS[stage]}")
    return max(found, key=lambda path: _mark(stage, path).stat().st_mtime)


def _mark(stage: str, folder: Path) -> Path:
    return folder / _MARKS.get(stage, "checkpoints/latest")


def _results(stage: str, root: Path) -> list[Path]:
    """Folders one or two levels below the root that hold a whole result of the stage."""
    folders = [*root.glob("*/"), *root.glob("*/*/")]
    return [
        f
        for f in folders
        if not f.name.startswith(".") and _mark(stage, f).is_file() and _kind(stage, f) == stage
    ]


def _kind(stage: str, folder: Path) -> str | None:
    """Which stage made a folder; None for one that is damaged or something else."""
    if stage == "text":  # a model directory holds a text_tokenizer.json too
        return None if (folder / "config.json").exists() else "text"
    try:
        if stage != "tokens":
            folder = (
                folder
                / "checkpoints"
                / (folder / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
            )
        meta = read_json(folder / "meta.json")
    except ValueError:
        return None
    return meta.get("kind") if isinstance(meta, dict) else None


def resolve_input(stage: str, given: Path | None) -> Path:
    """The path given, or the newest under runs/; says which it took."""
    path = given or latest_run(stage)
    if not path.exists():
        raise ValueError(f"no {stage} at {path}; make one:\n    {MAKE_COMMANDS[stage]}")
    print(f"taking {stage} from {path}")
    return path


def load_stage(stage: str, given: Path | None, device: Any = "cpu") -> LoadedModel:
    """A model of an earlier stage, with its averaged weights; warns when its training is not complete.

    As the dVAE it also takes a published image tokenizer: OpenAI's encoder.pkl and decoder.pkl in one folder,
    say.
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


def load_text_input(given: Path | None) -> BPETokenizer:
    """The text tokenizer of an earlier stage, or any file that `load_text_tokenizer` reads."""
    path = resolve_input("text", given)
    return load_text_tokenizer(path / "text_tokenizer.json" if path.is_dir() else path)

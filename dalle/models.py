"""From a kind to its model, and back from a checkpoint that describes itself.

A part is read from a run (its newest checkpoint, sharded or not), from one checkpoint, or from a model directory
written by `DALLE.save_pretrained`. The averaged weights are taken unless the raw ones are asked for.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle.clip import CLIP, CLIPConfig
from dalle.config import from_dict, to_dict
from dalle.dvae import DVAE, DVAEConfig
from dalle.files import read_json, read_tensors, write_tensors
from dalle.train.checkpoint import check_meta, damage, latest_checkpoint
from dalle.train.ema import corrected
from dalle.train.sharded import read_whole
from dalle.train.state import load_strict
from dalle.transformer import Transformer, TransformerConfig

KINDS: dict[str, tuple[type, type[nn.Module]]] = {
    "dvae": (DVAEConfig, DVAE),
    "transformer": (TransformerConfig, Transformer),
    "clip": (CLIPConfig, CLIP),
}


@dataclass
class Part:
    """A loaded model and what its checkpoint says of it."""

    kind: str
    model: nn.Module
    meta: dict[str, Any]
    source: Path

    @property
    def hash(self) -> str:
        """Of the weights in use."""
        return weights_hash(self.model)

    @property
    def links(self) -> dict[str, Any]:
        """What it was trained with: "text" (the tokenizer itself), "text_hash", "dvae" (a hash)."""
        return self.meta.get("links", {})


def build(kind: str, config: Any) -> nn.Module:
    """A fresh model of a kind."""
    config_class, model_class = KINDS[kind]
    assert isinstance(config, config_class), f"{kind} needs a {config_class.__name__}, got {type(config).__name__}"
    return model_class(config)


def describe(kind: str, model: nn.Module, run: Any, links: dict[str, Any] | None = None) -> dict[str, Any]:
    """The meta of a checkpoint: all that is needed to build and join the model again."""
    versions = {"torch": torch.__version__}
    return {
        "kind": kind,
        "config": to_dict(model.config),
        "run": run,
        "links": links or {},
        "versions": versions,
    }


def load_part(path: Path | str, kind: str, device: str | torch.device = "cpu", averaged: bool = True) -> Part:
    """A model in eval mode from a run, a checkpoint or a model directory.

    Raises:
        ValueError: nothing there, another kind, another format, a damaged file (by its hash).
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return _from_model_directory(path, kind, device)
    folder = latest_checkpoint(path) or path
    meta = read_json(folder / "meta.json")
    check_meta(meta, kind, folder)
    if damaged := damage(folder, parts=("model", "ema") if averaged else ("model",)):
        raise ValueError(f"{damaged}; an earlier checkpoint beside it may be whole")
    tensors = read_whole(folder, "model")
    if averaged:
        ema = meta["ema"]
        tensors |= corrected(read_whole(folder, "ema"), ema["decay"], ema["updates"])
    return _part(kind, meta, tensors, folder, device)


def _from_model_directory(path: Path, kind: str, device: str | torch.device) -> Part:
    config = read_json(path / "config.json")
    check_meta(config, "dalle", path)
    if kind not in config["parts"]:
        raise ValueError(f"{path} holds no {kind}; it has {', '.join(config['parts'])}")
    links = config["links"]
    links = {"text": read_json(path / "text.json"), "text_hash": links["text"], "dvae": links["dvae"]}
    meta = config["parts"][kind] | {"links": links}
    return _part(kind, meta, read_tensors(path / f"{kind}.safetensors"), path, device)


def _part(kind: str, meta: dict[str, Any], tensors: dict[str, Tensor], source: Path, device) -> Part:
    config_class, _ = KINDS[kind]
    model = build(kind, from_dict(config_class, meta["config"], str(source)))
    load_strict(model, tensors, source)
    return Part(kind, model.to(device).eval().requires_grad_(False), meta, source)


def save_weights(model: nn.Module, path: Path) -> None:
    """The weights in use as one safetensors file."""
    write_tensors(path, model.state_dict())


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, shapes and bytes of the weights in order of name, 16 hex characters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

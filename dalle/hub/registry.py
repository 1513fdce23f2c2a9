"""Building, loading and saving models by kind: "dvae", "transformer", "clip", "base" or "upsampler".

A model is loaded from a run (its latest checkpoint), from a checkpoint, or from a model directory, with its
EMA weights unless the raw ones are requested.

A model directory has config.json, text_tokenizer.json, README.md and a safetensors file for each part.
config.json names the hashes of the weights ("parts"), of the text tokenizer and of the dVAE that made the
image tokens ("links").

The weights of an opened model are the mapped file itself. Its hash is compared when a process opens it first,
and again if its size or time has changed, as for token caches.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle.clip import CLIP, CLIPConfig
from dalle.config import LAYERS, from_dict, to_dict
from dalle.dvae import DVAE, DVAEConfig
from dalle.hub.hub import push_to_hub, resolve_source
from dalle.hub.model_card import Report, read_report, write_card
from dalle.hub.weights_hash import WeightsHash, remember_hash, weights_hash
from dalle.io.files import (
    FORMAT,
    check_meta,
    check_result,
    load_strict,
    make_directory,
    read_config,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from dalle.meta_device import SkipRandomInit
from dalle.text import BPETokenizer, text_tokenizer_from_dict
from dalle.text.bpe import json_hash
from dalle.train.checkpoint import latest_checkpoint, verify_checkpoint
from dalle.train.sharded_checkpoint import read_whole
from dalle.train.state import bias_corrected
from dalle.transformer import Transformer, TransformerConfig
from dalle.unet import UNet, UNetConfig

MODEL_REGISTRY: dict[str, tuple[type, type[nn.Module]]] = {
    "dvae": (DVAEConfig, DVAE),
    "transformer": (TransformerConfig, Transformer),
    "clip": (CLIPConfig, CLIP),
    "base": (UNetConfig, UNet),
    "upsampler": (UNetConfig, UNet),
}
_verified: dict[Path, tuple[int, int, str]] = {}
"""Size, time and hash of the weights of a file that matched."""


@dataclass
class LoadedModel:
    """A model and the description of its checkpoint, if any: `LoadedModel("dvae", model)`."""

    kind: str
    model: nn.Module
    meta: dict[str, Any] = field(default_factory=dict)
    source: Path = Path("this model")
    inputs: dict[str, Any] = field(default_factory=dict)
    """What it was trained with: "text" (the tokenizer's data), "text_hash", "dvae" (a hash)."""

    push_to_hub = push_to_hub

    @property
    def hash(self) -> str:
        """Of the weights."""
        return weights_hash(self.model)

    def save_pretrained(
        self, directory: Path | str, report: Report | None = None, license: str | None = None
    ) -> None:
        """Writes a model directory of this part, with its text tokenizer; see `write_model_directory`."""
        text = dvae_hash = None
        if self.kind != "dvae" and "text" in self.inputs:
            text = text_tokenizer_from_dict(self.inputs["text"])
        if self.kind == "transformer":
            dvae_hash = self.inputs.get("dvae")
        write_model_directory(Path(directory), {self.kind: self.model}, text, dvae_hash, report, license)

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        kind: str | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "LoadedModel":
        """One part of a model directory, a run, or a Hub repository, of which only its files are downloaded.

        `kind` is required if there are several parts; for `revision` and `token` see `resolve_source`.
        """
        if kind is None:
            kind = _only_kind(resolve_source(source, (), revision, token))
        if kind not in MODEL_REGISTRY:
            raise ValueError(f"kind must be one of {', '.join(MODEL_REGISTRY)}, got {kind!r}")
        return load_model(resolve_source(source, (kind,), revision, token), kind, device)


def build_model(kind: str, config: Any) -> nn.Module:
    """A freshly initialized model."""
    return MODEL_REGISTRY[kind][1](config)


def checkpoint_meta(
    kind: str, model: nn.Module, run: Any, inputs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """meta.json of a checkpoint: what is needed to build the model again and to join it with others."""
    versions = {"torch": torch.__version__}
    config = to_dict(model.config)
    return {"kind": kind, "model_config": config, "config": run, "inputs": inputs or {}, "versions": versions}


def load_model(
    path: Path | str, kind: str, device: str | torch.device = "cpu", averaged: bool = True
) -> LoadedModel:
    """A model in eval mode from a run, a checkpoint or a model directory; ValueError if damaged."""
    path = Path(path)
    is_directory = (path / "config.json").is_file()
    if is_directory:
        folder, (meta, tensors) = path, _read_directory(path, kind)
    else:
        folder, meta, tensors = _read_checkpoint(path, kind, averaged)
    config_class, model_class = MODEL_REGISTRY[kind]
    config = from_dict(config_class, meta.get("model_config"), str(folder))
    if (layers := max(getattr(config, name, 0) for name in LAYERS)) > len(tensors):
        raise ValueError(f"{folder} has {len(tensors)} tensors, too few for {layers} layers")
    try:
        with torch.device("meta"), SkipRandomInit():  # sizes that are not the weights' allocate nothing
            model = model_class(config)
        tensors = load_strict(model, tensors, folder)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{folder} has a model_config of impossible sizes: {error!s:.80}") from None
    file = path / f"{kind}.safetensors" if is_directory else None
    assign_weights(model, tensors, device, file, meta.get("hash"))
    return LoadedModel(kind, model.eval().requires_grad_(False), meta, folder, meta.get("inputs", {}))


def _read_directory(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What config.json says of a part, with its inputs, and its tensors."""
    config = read_config(path)
    if kind not in config["parts"]:
        raise ValueError(f"{path} holds no {kind}; it has {', '.join(config['parts'])}")
    inputs = dict(config["inputs"])
    if "text" in inputs:
        file, expected = path / "text_tokenizer.json", inputs["text"]
        inputs |= {"text": read_json(file), "text_hash": expected}
        if (found := json_hash(inputs["text"])) != expected:
            found = f"{file.name} has hash {found}, expected {expected!s:.80}"
            raise ValueError(f"{path}: the files do not belong together: {found}")
    return config["parts"][kind] | {"inputs": inputs}, read_tensors(path / f"{kind}.safetensors")


def _read_checkpoint(path: Path, kind: str, averaged: bool) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A checkpoint, or the newest whole one of a run, with its meta.json and tensors."""
    parts = ("model", "ema") if averaged else ("model",)
    whole = latest_checkpoint(path, parts)
    folder = whole or path
    meta = check_meta(read_json(folder / "meta.json"), kind, folder)
    if not whole and (damaged := verify_checkpoint(folder, parts=parts)):
        raise ValueError(f"{damaged}; use an earlier checkpoint")
    tensors = read_whole(folder, "model")
    if averaged:
        ema = meta["ema"]
        tensors |= bias_corrected(read_whole(folder, "ema"), ema["decay"], ema["updates"])
    return folder, meta, tensors


def assign_weights(
    model: nn.Module,
    tensors: dict[str, Tensor],
    device: str | torch.device,
    file: Path | None = None,
    expected: str | None = None,
) -> None:
    """Tensors into a model on the meta device, moved one by one while threads hash them.

    ValueError if those of a `file` have another hash than `expected`. A file that matched is not hashed again
    in this process while its size and time stay the same.
    """
    state = None
    if file is not None:
        status = file.stat()
        state = status.st_size, status.st_mtime_ns, expected
    is_new = file is not None and _verified.get(file.resolve()) != state
    placed = {}
    with WeightsHash() as hashing:
        for name, like in sorted(model.state_dict().items()):
            tensor = tensors[name].to(like.dtype)
            if is_new:
                hashing.add(name, tensor)
            placed[name] = tensor.to(device)
        model.load_state_dict(placed, assign=True)
        found = hashing.hexdigest() if is_new else expected
    if found != expected:
        found = f"the weights have hash {found}, expected {expected}"
        raise ValueError(f"{file}: {found}; it is of another model or version of dalle, or changed")
    if isinstance(model, CLIP):
        model.make_text_mask(device)
    if file is not None:
        _verified[file.resolve()] = state
        remember_hash(model, expected)


def _only_kind(path: Path) -> str:
    """Kind of a model directory of one part, or of a run."""
    if (path / "config.json").is_file():
        kinds = list(read_config(path)["parts"])
        if len(kinds) != 1:
            raise ValueError(f"{path} holds {', '.join(kinds)}; give kind")
        return kinds[0]
    folder = latest_checkpoint(path, ()) or path
    meta = read_json(folder / "meta.json")
    kind = meta.get("kind")
    if not isinstance(kind, str):
        raise ValueError(f"{folder} has a model of kind {kind!r}, not one of {', '.join(MODEL_REGISTRY)}")
    return kind


def write_model_directory(
    directory: Path,
    parts: dict[str, nn.Module],
    text: BPETokenizer | None = None,
    dvae_hash: str | None = None,
    report: Report | None = None,
    license: str | None = None,
) -> None:
    """Writes a model directory with its card; ValueError for a part that is not this library's.

    Args:
        directory: created if there is none.
        parts: by kind, any of `MODEL_REGISTRY`.
        text: the tokenizer of the parts.
        dvae_hash: of the dVAE whose tokens a transformer generates, unless it is among the parts.
        report, license: see `write_card`.
    """
    for kind, model in parts.items():
        if not isinstance(model, expected := MODEL_REGISTRY[kind][1]):
            raise ValueError(f"only a {expected.__name__} of this library can be saved as {kind}")
        if (of := getattr(model.config, "kind", kind)) != kind:
            raise ValueError(f"this {expected.__name__} cannot be saved as {kind}; save it as {of}")
    described = {
        kind: {"model_config": to_dict(m.config), "hash": weights_hash(m)} for kind, m in parts.items()
    }
    report = read_report(report, described)
    make_directory(check_result(directory, "config.json"))
    for kind, model in parts.items():
        partial = directory / f".partial-{kind}.safetensors"
        write_tensors(partial, model.state_dict())
        os.replace(partial, directory / f"{kind}.safetensors")  # a model may map the file of this name
    inputs = {"dvae": described["dvae"]["hash"] if "dvae" in parts else dvae_hash}
    if text is not None:
        text.save(directory / "text_tokenizer.json")
        inputs["text"] = text.hash
    inputs = {name: value for name, value in inputs.items() if value}
    config = {"format": FORMAT, "kind": "dalle", "inputs": inputs, "parts": described}
    write_json(directory / "config.json", config)
    write_card(directory, report, license)

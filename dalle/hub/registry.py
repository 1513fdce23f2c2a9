"""From a kind to its model, and back from a checkpoint that describes itself.

A part is read from a run (its newest checkpoint, sharded or not), from one checkpoint, or from a model
directory written by `save_pretrained`. The averaged weights are taken unless the raw ones are asked for.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle.config import from_dict, to_dict
from dalle.hub.hub import HubMixin, resolve_source
from dalle.hub.model_card import Report
from dalle.hub.model_directory import MODEL_REGISTRY, model_files, weights_hash, write_model_directory
from dalle.io.files import read_json, read_tensors
from dalle.io.format import check_meta, read_config
from dalle.text import BPETokenizer, load_text_tokenizer, text_tokenizer_from_dict
from dalle.train.checkpoint import latest_checkpoint, verify_checkpoint
from dalle.train.ema import bias_corrected
from dalle.train.sharded_checkpoint import read_whole
from dalle.train.state import load_strict


@dataclass
class LoadedModel(HubMixin):
    """A loaded model and what its checkpoint says of it; `LoadedModel("dvae", model)` of a model made
    otherwise."""

    kind: str
    model: nn.Module
    meta: dict[str, Any] = field(default_factory=dict)
    source: Path = Path("this model")

    @property
    def hash(self) -> str:
        """Of the weights in use."""
        return weights_hash(self.model)

    @property
    def links(self) -> dict[str, Any]:
        """What it was trained with: "text" (the tokenizer itself), "text_hash", "dvae" (a hash)."""
        return self.meta.get("links", {})

    def save_pretrained(
        self, directory: Path | str, report: Report | None = None, license: str | None = None
    ) -> None:
        """Writes a model directory of this part alone, with the text tokenizer it reads.

        Args:
            directory: made if there is none.
            report, license: for the card, see `dalle.hub.model_card.write_card`.

        Raises:
            ValueError: a model that is not one of the library's own, or a directory that cannot be made.
        """
        text = (
            text_tokenizer_from_dict(self.links["text"])
            if self.kind != "dvae" and "text" in self.links
            else None
        )
        dvae_hash = self.links.get("dvae") if self.kind == "transformer" else None
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
        """One part from a model directory, a run, or the Hub; of a whole model no other part is downloaded.

        Args:
            source: a path, or an id of the Hub (dalle/hub/hub.py).
            kind: "dvae", "transformer" or "clip"; needed where there are several.
            device: where the model goes.
            revision, token: of the Hub.

        Raises:
            ValueError: nothing there, several parts and no kind, another kind, a damaged file; as
                `dalle.hub.hub.resolve_source`.
        """
        if kind is None:
            kind = _only_kind(resolve_source(source, ["config.json"], revision, token))
        if kind not in MODEL_REGISTRY:
            raise ValueError(f"kind must be one of {', '.join(MODEL_REGISTRY)}, got {kind!r}")
        return load_model(resolve_source(source, model_files(kind), revision, token), kind, device)


def check_linked(
    dvae: LoadedModel, transformer: LoadedModel, clip: LoadedModel | None, text: BPETokenizer | None
) -> BPETokenizer:
    """The transformer's text tokenizer; ValueError for models that were not trained for one another."""
    for part, needed in ((transformer, {"text", "dvae"}), (clip, {"text_hash"})):
        if part and (missing := needed - part.links.keys()):
            raise ValueError(
                f"{part.source} does not name the {' and '.join(sorted(missing))} of its training"
            )
    own = text_tokenizer_from_dict(transformer.links["text"])
    if text is not None and text.hash != own.hash:
        raise ValueError(f"{transformer.source} was trained with a text tokenizer other than the one given")
    if transformer.links["dvae"] != dvae.hash:
        raise ValueError(
            f"{transformer.source} was trained on tokens of dVAE {transformer.links['dvae']}, "
            f"{dvae.source} is {dvae.hash}: they do not belong together"
        )
    if clip is not None and clip.links["text_hash"] != own.hash:
        raise ValueError(f"{clip.source} was trained with a text tokenizer other than {transformer.source}'s")
    return own


def build_model(kind: str, config: Any) -> nn.Module:
    """A fresh model of a kind."""
    config_class, model_class = MODEL_REGISTRY[kind]
    assert isinstance(config, config_class), (
        f"{kind} needs a {config_class.__name__}, got {type(config).__name__}"
    )
    return model_class(config)


def checkpoint_meta(
    kind: str, model: nn.Module, run: Any, links: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The meta of a checkpoint: all that is needed to build and join the model again."""
    versions = {"torch": torch.__version__}
    return {
        "kind": kind,
        "config": to_dict(model.config),
        "run": run,
        "links": links or {},
        "versions": versions,
    }


def load_model(
    path: Path | str, kind: str, device: str | torch.device = "cpu", averaged: bool = True
) -> LoadedModel:
    """A model in eval mode from a run, a checkpoint or a model directory, all of them on disk.

    Raises:
        ValueError: nothing there, another kind, another format, a damaged file (by its hash).
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return _from_model_directory(path, kind, device)
    folder = latest_checkpoint(path) or path
    meta = check_meta(read_json(folder / "meta.json"), kind, folder)
    if damaged := verify_checkpoint(folder, parts=("model", "ema") if averaged else ("model",)):
        raise ValueError(f"{damaged}; an earlier checkpoint beside it may be whole")
    tensors = read_whole(folder, "model")
    if averaged:
        ema = meta["ema"]
        tensors |= bias_corrected(read_whole(folder, "ema"), ema["decay"], ema["updates"])
    return _part(kind, meta, tensors, folder, device)


def _from_model_directory(path: Path, kind: str, device: str | torch.device) -> LoadedModel:
    config = read_config(path)
    if kind not in config["parts"]:
        raise ValueError(f"{path} holds no {kind}; it has {', '.join(config['parts'])}")
    links = _links(path, config["links"])
    meta = config["parts"][kind] | {"links": links}
    part = _part(kind, meta, read_tensors(path / f"{kind}.safetensors"), path, device)
    if part.hash != meta["hash"]:
        raise ValueError(
            f"{path / f'{kind}.safetensors'}: the weights have hash {part.hash}, expected {meta['hash']}; "
            "the file is of another model, or changed"
        )
    return part


def _links(path: Path, named: dict[str, str]) -> dict[str, Any]:
    """`LoadedModel.links` of a model directory; ValueError where text_tokenizer.json is of another model."""
    links: dict[str, Any] = {"dvae": named["dvae"]} if "dvae" in named else {}
    if "text" in named:
        text = load_text_tokenizer(path / "text_tokenizer.json")
        if text.hash != named["text"]:
            raise ValueError(
                f"{path}: the files do not belong together: text_tokenizer.json has hash {text.hash}, "
                f"expected {named['text']}"
            )
        links |= {"text": text.to_dict(), "text_hash": text.hash}
    return links


def _only_kind(path: Path) -> str:
    """What a model directory of one part, or a run, holds."""
    if not (path / "config.json").is_file():
        folder = latest_checkpoint(path) or path
        meta = read_json(folder / "meta.json")
        kind = meta.get("kind") if isinstance(meta, dict) else None
        if not isinstance(kind, str):
            raise ValueError(
                f"{folder} holds {kind or 'something unknown'!r}, expected one of {', '.join(MODEL_REGISTRY)}"
            )
        return kind
    parts = list(read_config(path)["parts"])
    if len(parts) != 1:
        raise ValueError(f"{path} holds {', '.join(parts)}; say which as kind")
    return parts[0]


def _part(kind: str, meta: dict[str, Any], tensors: dict[str, Tensor], source: Path, device) -> LoadedModel:
    config_class, _ = MODEL_REGISTRY[kind]
    model = build_model(kind, from_dict(config_class, meta["config"], str(source)))
    load_strict(model, tensors, source)
    return LoadedModel(kind, model.to(device).eval().requires_grad_(False), meta, source)

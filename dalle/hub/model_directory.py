"""Model directories: config.json, text_tokenizer.json, README.md and a safetensors file for each part.

A directory holds a whole model or a single part. config.json names the hashes of the weights ("parts"), of
the text tokenizer and of the dVAE that made the image tokens ("inputs").
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from dalle.clip import CLIP, CLIPConfig
from dalle.config import to_dict
from dalle.dvae import DVAE, DVAEConfig
from dalle.hub.model_card import Report, read_report, write_card
from dalle.io.files import make_directory, write_json, write_tensors
from dalle.io.format import FORMAT
from dalle.text import BPETokenizer
from dalle.transformer import Transformer, TransformerConfig

MODEL_REGISTRY: dict[str, tuple[type, type[nn.Module]]] = {
    "dvae": (DVAEConfig, DVAE),
    "transformer": (TransformerConfig, Transformer),
    "clip": (CLIPConfig, CLIP),
}


def model_files(*kinds: str) -> list[str]:
    """Names of the files that opening these parts needs."""
    return ["config.json", "text_tokenizer.json", *(f"{kind}.safetensors" for kind in kinds)]


def write_model_directory(
    directory: Path,
    parts: dict[str, nn.Module],
    text: BPETokenizer | None = None,
    dvae_hash: str | None = None,
    report: Report | None = None,
    license: str | None = None,
) -> None:
    """Writes a model directory, with a model card.

    Args:
        directory: created if there is none.
        parts: any of "dvae", "transformer" and "clip".
        text: the tokenizer of the parts.
        dvae_hash: of the dVAE whose tokens a transformer generates, unless it is among the parts.
        report, license: see `dalle.hub.model_card.write_card`.

    Raises:
        ValueError: a part that is not this library's, a directory that cannot be written, or a report of
            another model.
    """
    for kind, model in parts.items():
        if not isinstance(model, expected := MODEL_REGISTRY[kind][1]):
            raise ValueError(f"only a {expected.__name__} of this library can be saved as {kind}")
    described = {
        kind: {"model_config": to_dict(m.config), "hash": weights_hash(m)} for kind, m in parts.items()
    }
    report = read_report(report, described)
    make_directory(directory)
    for kind, model in parts.items():
        save_weights(model, directory / f"{kind}.safetensors")
    inputs = {}
    if text is not None:
        text.save(directory / "text_tokenizer.json")
        inputs["text"] = text.hash
    if "dvae" in parts:
        dvae_hash = described["dvae"]["hash"]
    if dvae_hash:
        inputs["dvae"] = dvae_hash
    config = {"format": FORMAT, "kind": "dalle", "inputs": inputs, "parts": described}
    write_json(directory / "config.json", config)
    write_card(directory, report, license)


def save_weights(model: nn.Module, path: Path) -> None:
    """The weights as a safetensors file."""
    write_tensors(path, model.state_dict())


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of the weights in order of name, 16 hex characters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

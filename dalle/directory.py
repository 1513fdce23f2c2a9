"""A model directory: config.json, text.json and a safetensors file a part, which belong together by their hashes."""

from pathlib import Path

import torch
from torch import nn

from dalle.clip import CLIP
from dalle.config import to_dict
from dalle.dvae import DVAE
from dalle.files import make_directory, read_json, write_json
from dalle.models import load_part, save_weights, weights_hash
from dalle.text import MergeTokenizer, load_text
from dalle.train.checkpoint import FORMAT, check_meta
from dalle.transformer import Transformer


def write_directory(directory: Path, parts: dict[str, nn.Module], text: MergeTokenizer, model_hash: str) -> None:
    """Writes a model directory.

    Args:
        parts: "dvae", "transformer" and perhaps "clip".

    Raises:
        ValueError: a part that is not one of the library's own models, or a directory that cannot be made.
    """
    for kind, expected in (("dvae", DVAE), ("transformer", Transformer), ("clip", CLIP)):
        if kind in parts and not isinstance(parts[kind], expected):
            raise ValueError(f"only a {expected.__name__} of this library can be saved as {kind}; save it yourself")
    make_directory(directory)
    links = {"text": text.hash, "dvae": weights_hash(parts["dvae"])}
    for kind, model in parts.items():
        save_weights(model, directory / f"{kind}.safetensors")
    text.save(directory / "text.json")
    described = {kind: {"config": to_dict(model.config)} for kind, model in parts.items()}
    write_json(
        directory / "config.json",
        {"format": FORMAT, "kind": "dalle", "hash": model_hash, "links": links, "parts": described},
    )


def read_directory(directory: Path, device: str | torch.device) -> tuple[dict[str, nn.Module], MergeTokenizer, str]:
    """The parts by kind, the text tokenizer, and the hash that the weights must have.

    Raises:
        ValueError: no such directory, a damaged file, or parts that do not belong together.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is no model directory (it has no config.json); make one with save_pretrained")
    config = read_json(directory / "config.json")
    check_meta(config, "dalle", directory)
    if missing := {"hash", "links", "parts"} - config.keys():
        raise ValueError(f"{directory / 'config.json'} lacks {', '.join(sorted(missing))}; it is damaged")
    text = load_text(directory / "text.json")
    kinds = ["dvae", "transformer"] + ["clip"] * ("clip" in config["parts"])
    parts = {kind: load_part(directory, kind, device).model for kind in kinds}
    found = {"text": text.hash, "dvae": weights_hash(parts["dvae"])}
    if found != config["links"]:
        raise ValueError(f"{directory}: the files do not belong together: {found}, expected {config['links']}")
    return parts, text, config["hash"]

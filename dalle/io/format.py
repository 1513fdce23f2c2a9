"""Format of a checkpoint's meta.json and a model directory's config.json: number and checks."""

from pathlib import Path
from typing import Any

from dalle.io.files import read_json

FORMAT = 1


def check_meta(meta: Any, kind: str, source: Path) -> dict[str, Any]:
    """The content of meta.json or config.json; ValueError for another kind or format, or a damaged file.

    `kind` is "dvae", "transformer", "clip", or "dalle" for a model directory.
    """
    found = meta.get("kind") if isinstance(meta, dict) else None
    if found != kind:
        raise ValueError(f"{source} holds {found or 'something unknown'!r}, expected {kind!r}")
    number = meta.get("format")
    if type(number) is not int or number != FORMAT:
        raise ValueError(
            f"{source} has format {number!r}, this version reads {FORMAT}; use the version that wrote it"
        )
    names = ("model_config", "config", "inputs", "parts")
    if wrong := [name for name in names if not isinstance(meta.get(name, {}), dict)]:
        raise ValueError(f"{source}: {' and '.join(wrong)} must be JSON objects; it is damaged")
    return meta


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory; ValueError if there is none, for another format or a damaged one."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} is no model directory (it has no config.json); make one with save_pretrained"
        )
    config = check_meta(read_json(path), "dalle", directory)
    if "inputs" not in config or not config.get("parts"):
        raise ValueError(f"{path} lacks inputs or parts; it is damaged")
    for kind, part in config["parts"].items():
        described = part if isinstance(part, dict) else {}
        model_config, digest = described.get("model_config"), described.get("hash")
        if not kind.isidentifier() or not isinstance(model_config, dict) or not isinstance(digest, str):
            raise ValueError(
                f"{path}: part {kind!r} needs a valid name, a model_config and a hash; it is damaged"
            )
    return config

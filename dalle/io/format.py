"""The format of what describes a checkpoint (meta.json) or a model directory (config.json), and older ones made new.

A description carries the number of its format. Each change of the format is one function from a description of the
format before to one of the format after; an older description goes through all that follow it.

    2  checkpoints without SHA256SUMS
    3  SHA256SUMS in checkpoints
    4  a model directory tells the hash of each part; before, those of all parts in one word, "dvae-transformer-clip"
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle.io.files import read_json

FORMAT = 4
"""What is written."""

Description = dict[str, Any]


def _to_3(meta: Description) -> Description:
    return meta  # the hashes lie in a file beside it


def _to_4(meta: Description) -> Description:
    if meta["kind"] != "dalle":
        return meta
    meta = dict(meta)
    hashes = dict(zip(("dvae", "transformer", "clip"), str(meta.pop("hash", "")).split("-"), strict=False))
    meta["parts"] = {kind: {**part, "hash": hashes.get(kind)} for kind, part in meta["parts"].items()}
    return meta


MIGRATIONS: dict[int, Callable[[Description], Description]] = {2: _to_3, 3: _to_4}
"""From the format of this number to the next. Format 1 cannot be read: its transformer had other tensors."""


def check_meta(meta: Any, kind: str, source: Path) -> Description:
    """A description as `FORMAT` has it; the one given stays as it is.

    Args:
        meta: what the file holds.
        kind: what it must be of: "dvae", "transformer", "clip", or "dalle" for a model directory.
        source: named in errors.

    Raises:
        ValueError: another kind, a format that came before the first migration, or one of a later version.
    """
    found = meta.get("kind") if isinstance(meta, dict) else None
    if found != kind:
        raise ValueError(f"{source} holds {found or 'something unknown'!r}, expected {kind!r}")
    number = meta.get("format")
    if type(number) is not int or number < min(MIGRATIONS):
        raise ValueError(
            f"{source} has format {number!r}, this version reads {min(MIGRATIONS)} to {FORMAT}; "
            "use the version that wrote it"
        )
    if number > FORMAT:
        raise ValueError(
            f"{source} has format {number}, this version reads {FORMAT} and older: "
            "a later version of this library wrote it; update the library"
        )
    if wrong := [name for name in ("config", "links") if not isinstance(meta.get(name, {}), dict)]:
        raise ValueError(f"{source}: what is said of its {' and '.join(wrong)} is damaged")
    for step in range(number, FORMAT):
        meta = MIGRATIONS[step](meta) | {"format": step + 1}
    return meta


def read_config(directory: Path) -> Description:
    """config.json of a model directory, as `FORMAT` has it.

    Raises:
        ValueError: no model directory, a damaged config.json, or a format that is not read.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} is no model directory (it has no config.json); make one with save_pretrained"
        )
    written = read_json(path)
    if isinstance(written, dict) and written.get("kind") == "dalle":
        if lacking := [name for name in ("links", "parts") if not isinstance(written.get(name), dict)]:
            raise ValueError(f"{path} lacks {', '.join(lacking)}; it is damaged")
        if not written["parts"]:
            raise ValueError(f"{path} names no parts; it is damaged")
        if wrong := [
            kind for kind in written["parts"] if not kind.isidentifier()
        ]:  # a part's name is its file's
            raise ValueError(
                f"{path} names parts that cannot be, {', '.join(map(repr, wrong))}; it is damaged"
            )
        if wrong := [kind for kind, part in written["parts"].items() if not isinstance(part, dict)]:
            raise ValueError(f"{path} tells nothing of {', '.join(wrong)}; it is damaged")
    config = check_meta(written, "dalle", directory)
    if wrong := [kind for kind, part in config["parts"].items() if not _is_told(part)]:
        raise ValueError(f"{path} lacks the config or the hash of {', '.join(wrong)}; it is damaged")
    return config


def _is_told(part: Description) -> bool:
    settings, name = part.get("config"), part.get("hash")
    return bool(settings and name) and isinstance(settings, dict) and isinstance(name, str)

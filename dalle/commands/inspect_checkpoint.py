"""What a checkpoint is, without loading it: whose, how large, for which vocabulary, what it lacks, its hash.

Any file of weights may be asked about, trusted or not: nothing of it is run, and the numbers of its tensors are
read only for the hash, but for ruDALL-E's masks, which tell its version.
"""

import hashlib
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Positional

from dalle.config import from_dict, to_dict
from dalle.hub.registry import MODEL_REGISTRY
from dalle.io.files import read_json, write_json
from dalle.io.format import check_meta, read_config
from dalle.pretrained.family import KeyComparison, compare_keys, without_values
from dalle.pretrained.load import DetectedCheckpoint, at_hand, detect_checkpoint, is_external_checkpoint
from dalle.pretrained.openai_dvae import PARTS
from dalle.pretrained.refused import refuse_path
from dalle.pretrained.torch_file import read_torch_file
from dalle.train.checkpoint import latest_checkpoint

SHOWN = 5  # names of a list that are printed; the JSON has them all


@dataclass(frozen=True)
class InspectCheckpointArgs:
    """Says what a checkpoint file, run or model directory holds."""

    path: Positional[Path | None] = None
    """The file, or the directory."""
    json: Path | None = None
    """File for the report; printed too."""


def inspect_checkpoint(run: InspectCheckpointArgs) -> dict[str, Any]:
    """The report, printed and written.

    Raises:
        ValueError: nothing there, a file that is broken or would run code, a checkpoint that cannot be held.
    """
    if run.path is None:
        raise ValueError("say which: python scripts/inspect_checkpoint.py FILE or DIRECTORY")
    if not run.path.exists():
        raise ValueError(
            f"nothing at {run.path}; give the file of a checkpoint, or the folder of a run or model"
        )
    if run.json and run.json.is_dir():
        raise ValueError(f"{run.json} is a directory; expected the name of a file")
    report = {"path": str(run.path), **_describe(run.path)}
    if run.json:
        write_json(run.json, report)
    for name, value in report.items():
        print(f"{name:<12} {_shown(value)}")
    return report


def _describe(path: Path) -> dict[str, Any]:
    if is_external_checkpoint(path):
        with at_hand(path) as place:
            return _published(detect_checkpoint(place))
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    if isinstance(config, dict) and "parts" in config:
        return _model_directory(path)
    if folder := latest_checkpoint(path) or (path if (path / "meta.json").is_file() else None):
        return _own_checkpoint(folder)
    refuse_path(path)
    raise ValueError(
        f"{path} is neither a run, a checkpoint nor a model directory, and has neither encoder.pkl nor decoder.pkl; "
        "of another program's folder give the file"
    )


# ---------------------------------------------------------------------------------------------
# Files of other programs
# ---------------------------------------------------------------------------------------------


def _published(found: DetectedCheckpoint) -> dict[str, Any]:
    files = [found.path] if found.path.is_file() else [found.path / f"{part}.pkl" for part in PARTS]
    told: dict[str, Any] = {"container": found.container, "tensors": len(found.tensors)}
    told["numbers"] = sum(_count(tensor.shape) for tensor in found.tensors.values())
    told["formats"] = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()})
    if found.family is None:
        told |= {"family": None, "note": _nobody(found)}
    else:
        told |= {"family": found.family.name, "kind": found.family.kind}
        try:
            told |= _fit(compare_keys(found.family, found.tensors), found)
        except ValueError as error:
            told |= {"fits": False, "note": str(error)}
        told["licence"] = found.family.licence
    return told | {"sha256": {file.name: sha256(file) for file in files}}


def _fit(comparison: KeyComparison, found: DetectedCheckpoint) -> dict[str, Any]:
    assert found.family is not None
    told = {
        "sizes": _sizes(comparison.config),
        "vocabulary": found.family.vocabulary(comparison.config),
        "parameters": comparison.parameters,
    }
    lists = {
        name: getattr(comparison, name) for name in ("missing", "extra", "misshapen", "mistyped", "ignored")
    }
    told["fits"] = not any(names for name, names in lists.items() if name != "ignored")
    return told | {name: names for name, names in lists.items() if names}


def _nobody(found: DetectedCheckpoint) -> str:
    if not found.tensors:
        return "no tensors under any name where programs keep weights"
    return f"tensors of nobody that is known, such as {', '.join(sorted(found.tensors)[:SHOWN])}"


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------
# This library's own
# ---------------------------------------------------------------------------------------------


def _own_checkpoint(folder: Path) -> dict[str, Any]:
    meta = read_json(folder / "meta.json")
    kind = meta.get("kind") if isinstance(meta, dict) else None
    if not isinstance(kind, str) or kind not in MODEL_REGISTRY:
        raise ValueError(
            f"{folder} holds {kind or 'something unknown'!r}, known are {', '.join(MODEL_REGISTRY)}"
        )
    check_meta(meta, kind, folder)
    links = {name: value for name, value in meta.get("links", {}).items() if name != "text"}
    if lacking := [name for name in ("config", "step", "steps") if name not in meta]:
        raise ValueError(f"{folder / 'meta.json'} lacks {', '.join(lacking)}; it is damaged")
    told = {
        "family": f"{kind} of this library",
        "format": meta["format"],
        "step": f"{meta['step']} of {meta['steps']}",
    }
    told |= _own_part(kind, meta["config"], folder / "model.safetensors", folder)
    return told | {"links": links, "versions": meta.get("versions", {})}


def _model_directory(path: Path) -> dict[str, Any]:
    config = read_config(path)
    written = read_json(path / "config.json")["format"]
    told: dict[str, Any] = {"family": "model directory of this library", "format": written}
    for kind, part in config["parts"].items():
        if kind not in MODEL_REGISTRY:
            raise ValueError(f"{path} holds {kind!r}, known are {', '.join(MODEL_REGISTRY)}")
        told[kind] = _own_part(kind, part["config"], path / f"{kind}.safetensors", path)
    return told | {"hash": "-".join(part["hash"] for part in config["parts"].values())}


def _own_part(kind: str, settings: dict[str, Any], file: Path, source: Path) -> dict[str, Any]:
    config_class, model_class = MODEL_REGISTRY[kind]
    config = from_dict(config_class, settings, str(source))
    found = {name: tuple(tensor.shape) for name, tensor in read_torch_file(file).tree.items()}
    with without_values():
        model = model_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name in found.keys() & expected.keys() if found[name] != expected[name]]
    told = {"sizes": to_dict(config), "parameters": sum(p.numel() for p in model.parameters())}
    told["fits"] = found == expected
    lists = {
        "missing": expected.keys() - found.keys(),
        "extra": found.keys() - expected.keys(),
        "misshapen": wrong,
    }
    told |= {name: sorted(names) for name, names in lists.items() if names}
    return told | {"sha256": {file.name: sha256(file)}}


# ---------------------------------------------------------------------------------------------
# On the screen
# ---------------------------------------------------------------------------------------------


def _sizes(config: Any) -> dict[str, Any]:
    assert is_dataclass(config)
    sizes = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _shown(value: Any) -> str:
    """One line, lists cut, names of strangers made harmless to a terminal."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, list) and len(value) > SHOWN and all(isinstance(inner, str) for inner in value):
        return f"{len(value)}: {_shown(value[:SHOWN])}, ..."
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else ascii(str(value))[1:-1]

"""Description of a checkpoint, of this library or another: format, sizes, faults, SHA-256."""

import hashlib
from pathlib import Path
from typing import Any

from dalle.config import from_dict, to_dict
from dalle.hub.registry import MODEL_REGISTRY
from dalle.io.files import read_json
from dalle.io.format import check_meta, read_config
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, compare_keys
from dalle.pretrained.load import check_supported_path, detect_checkpoint, extracted, is_external_checkpoint
from dalle.pretrained.openai_dvae import HALVES
from dalle.pretrained.torch_file import read_torch_file
from dalle.train.checkpoint import latest_checkpoint

FAULTS = ("missing", "unexpected", "wrong_shape", "wrong_dtype")


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """What a file or folder holds, as plain data.

    Raises:
        ValueError: a file that is broken or would run code, or no checkpoint.
    """
    if is_external_checkpoint(path):
        with extracted(path) as place:
            return _external(detect_checkpoint(place))
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    if isinstance(config, dict) and "parts" in config:
        return _model_directory(path, config)
    if folder := latest_checkpoint(path) or (path if (path / "meta.json").is_file() else None):
        return _training_checkpoint(folder)
    check_supported_path(path)
    raise ValueError(
        f"{path} is neither a run, a checkpoint nor a model directory, nor has it encoder.pkl or decoder.pkl;"
        " of another program's folder give the file"
    )


def _external(found: DetectedCheckpoint) -> dict[str, Any]:
    tensors, family = found.tensors.values(), found.family
    files = [found.path] if found.path.is_file() else [found.path / f"{half}.pkl" for half in HALVES]
    report: dict[str, Any] = {"container": found.container, "tensors": len(tensors)}
    report["numbers"] = sum(tensor.numel() for tensor in tensors)
    report["dtypes"] = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    if family is None:
        names = ", ".join(sorted(found.tensors)[:5])
        note = f"tensors of an unknown format, such as {names}" if names else "no tensors under any known key"
        report |= {"family": None, "note": note}
    else:
        report |= {"family": family.name, "kind": family.kind}
        try:
            report |= _comparison(found)
        except ValueError as error:
            report |= {"fits": False, "note": str(error)}
        report["license"] = family.license
    return report | {"sha256": {file.name: sha256(file) for file in files}}


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _training_checkpoint(folder: Path) -> dict[str, Any]:
    meta = read_json(folder / "meta.json")
    kind = meta.get("kind") if isinstance(meta, dict) else None
    _check_kind(folder, kind)
    check_meta(meta, kind, folder)
    if lacking := [name for name in ("model_config", "step", "steps") if name not in meta]:
        raise ValueError(f"{folder / 'meta.json'} lacks {', '.join(lacking)}; it is damaged")
    inputs = {name: value for name, value in meta.get("inputs", {}).items() if name != "text"}
    return {
        "family": f"{kind} of this library",
        "format": meta["format"],
        "step": f"{meta['step']} of {meta['steps']}",
        **_model(kind, meta["model_config"], folder / "model.safetensors", folder),
        "inputs": inputs,
        "versions": meta.get("versions", {}),
    }


def _model_directory(path: Path, written: dict[str, Any]) -> dict[str, Any]:
    parts = read_config(path)["parts"]
    report: dict[str, Any] = {"family": "model directory of this library", "format": written["format"]}
    for kind, part in parts.items():
        _check_kind(path, kind)
        report[kind] = _model(kind, part["model_config"], path / f"{kind}.safetensors", path)
    return report | {"hash": "-".join(part["hash"] for part in parts.values())}


def _check_kind(path: Path, kind: Any) -> None:
    if not isinstance(kind, str) or kind not in MODEL_REGISTRY:
        raise ValueError(f"{path} has a model of kind {kind!r}, expected one of {', '.join(MODEL_REGISTRY)}")


def _model(kind: str, settings: dict[str, Any], file: Path, source: Path) -> dict[str, Any]:
    config_class, model_class = MODEL_REGISTRY[kind]
    config = from_dict(config_class, settings, str(source))
    family = CheckpointFormat(
        *(kind, kind, "", ()), infer_config=lambda *_: config, build=model_class, vocabulary=lambda config: ""
    )
    report = _comparison(DetectedCheckpoint(file, family, read_torch_file(file).tree))
    return report | {"sha256": {file.name: sha256(file)}}


def _comparison(found: DetectedCheckpoint) -> dict[str, Any]:
    comparison = compare_keys(found)
    report: dict[str, Any] = {"sizes": to_dict(comparison.config)}
    if vocabulary := found.family.vocabulary(comparison.config):
        report["vocabulary"] = vocabulary
    faults = {name: getattr(comparison, name) for name in FAULTS}
    report |= {"parameters": comparison.parameters, "fits": not any(faults.values())}
    return report | {
        name: names for name, names in {**faults, "ignored": comparison.ignored}.items() if names
    }

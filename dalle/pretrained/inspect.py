"""Description of a checkpoint, of this library or another: format, sizes, faults, SHA-256."""

from pathlib import Path
from typing import Any

from dalle.config import from_dict, to_dict
from dalle.hub.registry import MODEL_REGISTRY
from dalle.io.files import check_meta, file_hashes, read_config, read_json
from dalle.io.torch_file import read_torch_file
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, compare_keys
from dalle.pretrained.glide import BASE, CLIP, UPSAMPLER, existing, is_glide_folder
from dalle.pretrained.load import check_supported_path, detect_checkpoint, extracted, is_external_checkpoint
from dalle.pretrained.openai_dvae import HALVES
from dalle.train.checkpoint import latest_checkpoint


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """What a file or folder holds, as plain data; ValueError for one that is broken or no checkpoint."""
    if is_external_checkpoint(path):
        with extracted(path) as extracted_path:
            return _external(detect_checkpoint(extracted_path))
    if is_glide_folder(path):
        return {
            file.stem: _external(detect_checkpoint(file)) for file in existing(path, *BASE, *UPSAMPLER, *CLIP)
        }
    if (path / "config.json").is_file() and "parts" in read_json(path / "config.json"):
        return _model_directory(path)
    if folder := latest_checkpoint(path) or (path if (path / "meta.json").is_file() else None):
        return _training_checkpoint(folder)
    check_supported_path(path)
    what = "neither a run, a checkpoint, a model directory nor a folder of encoder.pkl and decoder.pkl"
    raise ValueError(f"{path} is {what}; of another program's folder give the file")


def _external(found: DetectedCheckpoint) -> dict[str, Any]:
    tensors, family = found.tensors.values(), found.family
    report: dict[str, Any] = {
        "container": found.container,
        "tensors": len(tensors),
        "numbers": sum(tensor.numel() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "family": family.name if family else None,
    }
    if family is None:
        names = ", ".join(sorted(found.tensors)[:5])
        report["note"] = f"unknown tensors, such as {names}" if names else "no tensors under any known key"
    else:
        report |= {"kind": family.kind, "license": family.license}
        try:
            report |= _comparison(found)
        except ValueError as error:
            report |= {"fits": False, "note": str(error)}
    files = [found.path] if found.path.is_file() else [found.path / f"{half}.pkl" for half in HALVES]
    return report | {"sha256": file_hashes(files[0].parent, files)}


def _training_checkpoint(folder: Path) -> dict[str, Any]:
    meta = read_json(folder / "meta.json")
    kind = _check_kind(folder, meta.get("kind"))
    check_meta(meta, kind, folder)
    return {
        "family": f"{kind} of this library",
        "format": meta["format"],
        "step": f"{meta['step']} of {meta.get('steps', 'unknown')}",
        **_model(kind, meta.get("model_config"), folder / "model.safetensors", folder),
        "inputs": {name: value for name, value in meta.get("inputs", {}).items() if name != "text"},
        "versions": meta.get("versions", {}),
    }


def _model_directory(path: Path) -> dict[str, Any]:
    config = read_config(path)
    report: dict[str, Any] = {"family": "model directory of this library", "format": config["format"]}
    for kind, part in config["parts"].items():
        file = path / f"{kind}.safetensors"
        report[kind] = _model(_check_kind(path, kind), part["model_config"], file, path)
    return report | {"hash": "-".join(part["hash"] for part in config["parts"].values())}


def _check_kind(path: Path, kind: Any) -> str:
    if not isinstance(kind, str) or kind not in MODEL_REGISTRY:
        raise ValueError(f"{path} has a model of kind {kind!r}, expected one of {', '.join(MODEL_REGISTRY)}")
    return kind


def _model(kind: str, settings: dict[str, Any], file: Path, source: Path) -> dict[str, Any]:
    config_class, model_class = MODEL_REGISTRY[kind]
    config = from_dict(config_class, settings, str(source))
    family = CheckpointFormat(kind, kind, "", (), infer_config=lambda *_: config, build=model_class)
    report = _comparison(DetectedCheckpoint(file, family, read_torch_file(file).tree))
    return report | {"sha256": file_hashes(source, [file])}


def _comparison(found: DetectedCheckpoint) -> dict[str, Any]:
    comparison = compare_keys(found)
    report = {
        "sizes": to_dict(comparison.config),
        "parameters": sum(p.numel() for p in comparison.model.parameters()),
        "fits": not any(comparison.faults.values()),
        **comparison.faults,
        "ignored": comparison.ignored,
    }
    return {name: value for name, value in report.items() if value != []}

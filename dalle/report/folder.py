"""Contents of a folder that a report shows: training runs, a model, samples, evaluations."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle.hub.registry import MODEL_REGISTRY
from dalle.io.files import read_json
from dalle.train.checkpoint import latest_checkpoint
from dalle.viz.curves import CURVES, Lines, read_lines

META_TYPES = {
    "kind": str,
    "step": int,
    "model_config": dict,
    "config": dict,
    "inputs": dict,
    "versions": dict,
}
"""Types in a checkpoint's meta.json; values of another type are dropped."""
EVALUATION_KEYS = {"caption_accuracy", "provenance"}
"""A JSON file with one of these is an evaluation."""


@dataclass
class TrainedRun:
    """A training run: its kind (dvae, transformer, clip), the meta.json of its newest checkpoint, and its
    log."""

    kind: str
    folder: Path
    meta: dict[str, Any] = field(default_factory=dict)
    lines: Lines = field(default_factory=list)

    def sheets(self, name: str) -> list[tuple[int, Path]]:
        """(step, file) of the sheets <name>-STEP.png that evaluations wrote, by step."""
        files = [(path.stem.rpartition("-")[2], path) for path in self.folder.glob(f"{name}-*.png")]
        return sorted((int(step), path) for step, path in files if step.isdecimal())


@dataclass
class Contents:
    """Runs by kind, the model directory, evaluations by file name, folders of scripts/sample.py."""

    root: Path
    runs: dict[str, TrainedRun] = field(default_factory=dict)
    model: Path | None = None
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[Path] = field(default_factory=list)


def scan_folder(path: Path) -> Contents:
    """Searches a folder and two levels below it; or reads the JSON of an evaluation.

    Raises:
        ValueError: nothing there, or nothing of this library.
    """
    if path.is_file():
        contents = Contents(path.parent, evaluations=_evaluations([path]))
    elif path.is_dir():
        below = [child for child in sorted(path.iterdir()) if child.is_dir()]
        runs = [run for run in map(_run, [path, *below]) if run]
        models = [folder for folder in (path, path / "model", *below) if _is_model(folder)]
        depths, names = ("", "*/", "*/*/"), ("sample.json", "samples.jsonl")
        samples = [file.parent for d in depths for name in names for file in sorted(path.glob(d + name))]
        by_kind = {kind: run for kind in MODEL_REGISTRY for run in reversed(runs) if run.kind == kind}
        contents = Contents(
            path, by_kind, next(iter(models), None), _evaluations(path.glob("*.json")), samples
        )
    else:
        raise ValueError(
            f"nothing at {path}; give the folder of a run, or make one: python scripts/quickstart.py"
        )
    if not (contents.runs or contents.model or contents.evaluations or contents.samples):
        raise ValueError(
            f"{path} holds no run, model, samples or evaluation of this library; give the folder of one, "
            "such as runs/quickstart, or the JSON of scripts/evaluate.py"
        )
    return contents


def _run(folder: Path) -> TrainedRun | None:
    try:
        checkpoint = latest_checkpoint(folder)
    except ValueError:  # a dangling pointer: the rest of the folder is still shown
        checkpoint = None
    meta = _object(checkpoint / "meta.json") if checkpoint else {}
    meta = {name: value for name, value in meta.items() if isinstance(value, META_TYPES.get(name, object))}
    lines = read_lines(folder) if (folder / "log.jsonl").is_file() else []
    kind = meta.get("kind")
    if not checkpoint:  # the kind by its metrics
        logged = {name for line in lines for name in line}
        kind = next((kind for kind, names in CURVES.items() if set(names[1:]) & logged), None)
    return TrainedRun(kind, folder, meta, lines) if kind in MODEL_REGISTRY else None


def _is_model(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and _object(file).get("kind") == "dalle"


def _evaluations(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    reports = {file.name: _object(file) for file in sorted(files) if file.is_file()}
    return {name: data for name, data in reports.items() if EVALUATION_KEYS & data.keys()}


def _object(file: Path) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        return dict_or_empty(read_json(file))
    except ValueError:
        return {}


def dict_or_empty(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object; empty for anything else."""
    return value if isinstance(value, dict) else {}

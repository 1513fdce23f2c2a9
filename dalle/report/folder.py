"""What lies in a folder that a report is made of: training runs, a model, samples, evaluations."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle.hub.registry import MODEL_REGISTRY
from dalle.io.files import read_json
from dalle.train.checkpoint import latest_checkpoint
from dalle.viz.curves import CURVES, Lines, read_lines

KINDS_OF_VALUE = {"kind": str, "step": int, "config": dict, "run": dict, "links": dict, "versions": dict}
"""What a checkpoint's meta.json holds; anything else under these names is left out."""
EVALUATED = {"caption_accuracy", "provenance"}
"""A JSON file that has one of these is an evaluation's."""


@dataclass
class TrainedRun:
    """One training run."""

    kind: str
    """dvae, transformer or clip."""
    folder: Path
    checkpoint: Path | None
    """The newest."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Of that checkpoint; empty without one."""
    lines: Lines = field(default_factory=list)
    """Of its log."""

    def sheets(self, name: str) -> list[tuple[int, Path]]:
        """(step, file) of the images that evaluations left, <name>-STEP.png, in order."""
        found = [(path.stem.rpartition("-")[2], path) for path in self.folder.glob(f"{name}-*.png")]
        return sorted((int(step), path) for step, path in found if step.isdecimal())


@dataclass
class Folder:
    """All that was found."""

    root: Path
    runs: dict[str, TrainedRun]
    """By kind."""
    model: Path | None
    """A model directory."""
    evaluations: dict[str, dict[str, Any]]
    """By the name of the file."""
    samples: list[Path]
    """Folders of scripts/sample.py: of a caption (sample.json), or of a file of captions (samples.jsonl)."""


def examine(path: Path) -> Folder:
    """Looks into a run's folder, and one and two levels below it; or reads an evaluation's JSON.

    Raises:
        ValueError: there is nothing, or nothing of this library.
    """
    if path.is_file():
        found = Folder(path.parent, {}, None, _evaluations([path]), [])
    elif path.is_dir():
        below = [child for child in sorted(path.iterdir()) if child.is_dir()]
        runs = [run for run in map(_run, [path, *below]) if run]
        models = [folder for folder in (path, path / "model", *below) if _is_model(folder)]
        marks = [
            f"{below}{name}" for below in ("", "*/", "*/*/") for name in ("sample.json", "samples.jsonl")
        ]
        samples = [file.parent for mark in marks for file in sorted(path.glob(mark))]
        by_kind = {kind: run for kind in MODEL_REGISTRY for run in reversed(runs) if run.kind == kind}
        found = Folder(path, by_kind, next(iter(models), None), _evaluations(path.glob("*.json")), samples)
    else:
        raise ValueError(
            f"nothing at {path}; give the folder of a run, or make one: python scripts/quickstart.py"
        )
    if not (found.runs or found.model or found.evaluations or found.samples):
        raise ValueError(
            f"{path} holds no run, model, samples or evaluation of this library; give the folder of one, "
            "as runs/quickstart, or the JSON that scripts/evaluate.py wrote"
        )
    return found


def _run(folder: Path) -> TrainedRun | None:
    try:
        checkpoint = latest_checkpoint(folder)
    except ValueError:  # its pointer leads nowhere: what else is there can be shown
        checkpoint = None
    meta = _object(checkpoint / "meta.json") if checkpoint else {}
    meta = {
        name: value for name, value in meta.items() if isinstance(value, KINDS_OF_VALUE.get(name, object))
    }
    log = folder / "log.jsonl"
    if not checkpoint and not log.is_file():
        return None
    lines = read_lines(folder) if log.is_file() else []
    kind = meta.get("kind") if checkpoint else _kind_of(lines)
    return TrainedRun(kind, folder, checkpoint, meta, lines) if kind in MODEL_REGISTRY else None


def _kind_of(lines: Lines) -> str | None:
    """By the metrics that only one kind has."""
    names = {name for line in lines for name in line}
    return next((kind for kind, curves in CURVES.items() if set(curves[1:]) & names), None)


def _is_model(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and _object(file).get("kind") == "dalle"


def _evaluations(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    found = {file.name: _object(file) for file in sorted(files) if file.is_file()}
    return {name: data for name, data in found.items() if EVALUATED & data.keys()}


def _object(file: Path) -> dict[str, Any]:
    """An object of JSON; empty for anything else."""
    try:
        data = read_json(file)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}

"""Contents of a folder that a report shows: training runs, a model, samples, evaluations."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle.hub.registry import MODEL_REGISTRY
from dalle.io.files import read_json
from dalle.train.checkpoint import latest_checkpoint
from dalle.viz.curves import CURVES, Lines, read_lines

EVALUATION_KEYS = {"caption_accuracy", "provenance"}  # a JSON file with one of these is an evaluation


@dataclass
class TrainedRun:
    """A training run: its kind, the meta.json of its newest checkpoint, and its log."""

    kind: str
    folder: Path
    meta: dict[str, Any]
    lines: Lines


@dataclass
class Contents:
    """Runs by kind, the model directory, evaluations by file name, folders of scripts/sample.py."""

    root: Path
    runs: dict[str, TrainedRun] = field(default_factory=dict)
    model: Path | None = None
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[Path] = field(default_factory=list)


def scan_folder(path: Path) -> Contents:
    """Searches a folder and two levels below it, or reads an evaluation; ValueError for nothing there."""
    if path.is_file():
        contents = Contents(path.parent, evaluations=_evaluations([path]))
    elif path.is_dir():
        folders = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
        runs = [run for folder in folders if (run := _run(folder))]
        by_kind = {kind: run for kind in MODEL_REGISTRY for run in reversed(runs) if run.kind == kind}
        models = [folder for folder in folders if _read_object(folder / "config.json").get("kind") == "dalle"]
        patterns = [depth + name for depth in ("", "*/", "*/*/") for name in ("sample.json", "samples.jsonl")]
        samples = [file.parent for pattern in patterns for file in sorted(path.glob(pattern))]
        evaluations = _evaluations(sorted(path.glob("*.json")))
        contents = Contents(path, by_kind, next(iter(models), None), evaluations, samples)
    else:
        raise ValueError(f"nothing at {path}; give a run's folder, or make one: python scripts/quickstart.py")
    if not (contents.runs or contents.model or contents.evaluations or contents.samples):
        give = "give the folder of one, such as runs/quickstart, or the JSON of scripts/evaluate.py"
        raise ValueError(f"{path} holds no run, model, samples or evaluation of this library; {give}")
    return contents


def _run(folder: Path) -> TrainedRun | None:
    """The run of a folder; its log tells the kind where there is no readable checkpoint."""
    try:
        checkpoint = latest_checkpoint(folder)
    except ValueError:
        checkpoint = None
    meta = _read_object(checkpoint / "meta.json") if checkpoint else {}
    lines = read_lines(folder) if (folder / "log.jsonl").is_file() else []
    logged = {name for line in lines for name in line}
    kinds = [kind for kind, names in CURVES.items() if logged.intersection(names[1:])]
    kind = meta.get("kind", next(iter(kinds), None))
    return TrainedRun(kind, folder, meta, lines) if kind in list(MODEL_REGISTRY) else None


def _evaluations(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    reports = {file.name: _read_object(file) for file in files}
    return {name: report for name, report in reports.items() if EVALUATION_KEYS & report.keys()}


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        data = read_json(file) if file.is_file() else {}
    except ValueError:
        data = {}
    return data if isinstance(data, dict) else {}

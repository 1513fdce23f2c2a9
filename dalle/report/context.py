"""Report context: contents of a folder; its model, validation images and generations, loaded on first use."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dalle.commands.report import ReportArgs
from dalle.config import from_dict
from dalle.data import DataConfig, first_samples, open_dataset, sample_captions
from dalle.hub.registry import MODEL_REGISTRY, load_model
from dalle.io.files import read_json
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import Generation
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.precision import resolve_device
from dalle.types import ImageTextBatch, ImageTokenizer
from dalle.viz.curves import CURVES, Lines, read_lines

EVALUATION_KEYS = {"caption_accuracy", "provenance"}  # a JSON file with one of these is an evaluation
VAL_SAMPLES = 64  # images that code usage is counted on


@dataclass
class TrainedRun:
    """A training run: its kind, the meta.json of its newest checkpoint, and its log."""

    kind: str
    folder: Path
    meta: dict[str, Any]
    lines: Lines


class ReportContext:
    """Runs by kind, the model directory, evaluations by file name and folders of scripts/sample.py.

    Searches the folder of the arguments and two levels below it, or reads an evaluation; ValueError for
    nothing there. The properties raise ValueError for what is damaged or missing.
    """

    def __init__(self, args: ReportArgs):
        self.args, path = args, args.run
        if not path.exists():
            raise ValueError(f"nothing at {path}; give a run's folder, or make one: scripts/quickstart.py")
        self.root = path if path.is_dir() else path.parent
        folders = [path, *sorted(child for child in path.glob("*") if child.is_dir())]
        runs = [run for folder in folders if (run := _run(folder))]
        self.runs = {kind: run for kind in MODEL_REGISTRY for run in reversed(runs) if run.kind == kind}
        models = [folder for folder in folders if _read_object(folder / "config.json").get("kind") == "dalle"]
        self.model_directory = next(iter(models), None)
        patterns = [depth + name for depth in ("", "*/", "*/*/") for name in ("sample.json", "samples.jsonl")]
        self.samples = [file.parent for pattern in patterns for file in sorted(path.glob(pattern))]
        reports = {file.name: _read_object(file) for file in [path, *sorted(path.glob("*.json"))]}
        self.evaluations = {name: one for name, one in reports.items() if EVALUATION_KEYS & one.keys()}
        if not (self.runs or self.model_directory or self.evaluations or self.samples):
            give = "give the folder of one, such as runs/quickstart, or the JSON of scripts/evaluate.py"
            raise ValueError(f"{path} holds no run, model, samples or evaluation of this library; {give}")

    @cached_property
    def model(self) -> DALLE:
        """The model directory, or the runs joined."""
        if not self.args.sample:
            raise ValueError("nothing is sampled with --no-sample")
        device, runs = resolve_device(self.args.device), self.runs
        if self.model_directory:
            return DALLE.from_pretrained(self.model_directory, device)
        if not {"dvae", "transformer"} <= runs.keys():
            make = "python scripts/sample.py --prompt WORDS --save-pretrained runs/model"
            raise ValueError(f"needs a dVAE and a transformer; make a model directory:\n{make}")
        parts = {kind: load_model(runs[kind].folder, kind, device) for kind in runs}
        return DALLE.from_parts(parts["dvae"], parts["transformer"], parts.get("clip"))

    @cached_property
    def dvae(self) -> ImageTokenizer:
        """The image tokenizer of the dVAE's run, else of the model or its directory."""
        run = self.runs.get("dvae")
        folder = run.folder if run else self.model_directory
        if not self.args.sample or folder is None:
            return self.model.dvae
        return load_model(folder, "dvae", resolve_device(self.args.device)).model

    @cached_property
    def val_batch(self) -> ImageTextBatch:
        """The first validation samples of the dVAE's dataset, else of the transformer's."""
        runs = [self.runs[kind] for kind in ("dvae", "transformer") if kind in self.runs]
        configs = [run.meta.get("config", {}).get("data", {}) for run in runs]
        config = next((config for config in configs if config.get("path")), None)
        if config is None:
            raise ValueError("the folder does not say which images it was trained on; give --prompts")
        return first_samples(open_dataset(from_dict(DataConfig, config), "val"), VAL_SAMPLES)

    @property
    def temperature(self) -> float:
        """--temperature, else that of an evaluation in the folder, else 1."""
        values = [report.get("temperature") for report in self.evaluations.values()]
        return next(float(one) for one in (self.args.temperature, *values, 1.0) if one is not None)

    @cached_property
    def generations(self) -> list[Generation]:
        """All candidates of each prompt, best first; by default for the first validation captions."""
        args, model = self.args, self.model
        captions = args.prompts or sample_captions(self.val_batch, args.seed)[: args.captions]
        n = args.best_of if model.scorer else min(4, args.best_of)
        options = {"seed": args.seed, "temperature": self.temperature, "truncate": True}
        return model.generate(list(captions), n=n, best_of=n, **options)


def _run(folder: Path) -> TrainedRun | None:
    """The run of a folder; its log shows the kind where there is no readable checkpoint."""
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


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        return read_json(file) if file.is_file() else {}
    except ValueError:
        return {}

"""Report context: a folder's model, validation images and generations, each loaded on first use."""

from dataclasses import dataclass
from functools import cached_property

from dalle.commands.report import ReportArgs
from dalle.config import from_dict
from dalle.data import DataConfig, first_samples, open_dataset, sample_captions
from dalle.hub.registry import MODEL_REGISTRY, load_model
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import Generation
from dalle.report.folder import Contents
from dalle.train.precision import resolve_device
from dalle.types import ImageTextBatch, ImageTokenizer

VAL_SAMPLES = 64  # images that code usage is counted on


@dataclass
class ReportContext:
    """What sections read. The properties raise ValueError for what is damaged or missing."""

    contents: Contents
    args: ReportArgs

    @cached_property
    def model(self) -> DALLE:
        """The model directory, or the runs joined."""
        if not self.args.sample:
            raise ValueError("nothing is sampled with --no-sample")
        device, runs = resolve_device(self.args.device), self.contents.runs
        if self.contents.model:
            return DALLE.from_pretrained(self.contents.model, device)
        if not {"dvae", "transformer"} <= runs.keys():
            make = "python scripts/sample.py --prompt WORDS --save-pretrained runs/model"
            raise ValueError(f"needs a dVAE and a transformer; make a model directory:\n{make}")
        parts = {kind: load_model(runs[kind].folder, kind, device) for kind in MODEL_REGISTRY if kind in runs}
        return DALLE.from_parts(parts["dvae"], parts["transformer"], parts.get("clip"))

    @cached_property
    def dvae(self) -> ImageTokenizer:
        """The image tokenizer of the dVAE's run, else of the model or its directory."""
        run = self.contents.runs.get("dvae")
        folder = run.folder if run else self.contents.model
        if not self.args.sample or folder is None:
            return self.model.dvae
        return load_model(folder, "dvae", resolve_device(self.args.device)).model

    @cached_property
    def val_batch(self) -> ImageTextBatch:
        """The first validation samples of the dVAE's dataset, else of the transformer's."""
        runs = [self.contents.runs[kind] for kind in ("dvae", "transformer") if kind in self.contents.runs]
        configs = [run.meta.get("config", {}).get("data", {}) for run in runs]
        config = next((config for config in configs if config.get("path")), None)
        if config is None:
            raise ValueError("the folder does not say which images it was trained on; give --prompts")
        return first_samples(open_dataset(from_dict(DataConfig, config), "held_out"), VAL_SAMPLES)

    @property
    def temperature(self) -> float:
        """--temperature, else that of an evaluation in the folder, else 1."""
        values = [report.get("temperature") for report in self.contents.evaluations.values()]
        values = [self.args.temperature, *values, 1.0]
        return next(float(value) for value in values if value is not None)

    @cached_property
    def generations(self) -> list[Generation]:
        """All candidates of each prompt, best first; by default for the first validation captions."""
        args, model = self.args, self.model
        captions = args.prompts or sample_captions(self.val_batch, args.seed)[: args.captions]
        n = args.best_of if model.scorer else min(4, args.best_of)
        options = {"seed": args.seed, "temperature": self.temperature, "truncate": True}
        return model.generate(list(captions), n=n, best_of=n, **options)

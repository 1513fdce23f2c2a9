"""Report context: the folder, and its model, validation images and generations, each loaded on first use."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dalle.config import from_dict
from dalle.data import DataConfig, first_samples, open_dataset, sample_captions
from dalle.hub.registry import MODEL_REGISTRY, load_model
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import Generation
from dalle.report.folder import Contents
from dalle.train.precision import resolve_device
from dalle.types import ImageTextBatch, ImageTokenizer

if TYPE_CHECKING:
    from dalle.commands.report import ReportArgs

VAL_SAMPLES = 64
"""Validation images that code usage is counted on."""
SHOWN = 4
"""Images of a caption, and reconstructions."""


@dataclass
class ReportContext:
    """What sections read. The properties raise ValueError for what is damaged or cannot be made."""

    contents: Contents
    args: "ReportArgs"

    @cached_property
    def model(self) -> DALLE:
        """The model directory, or the runs joined."""
        if not self.args.sample:
            raise ValueError("nothing is sampled with --no-sample")
        device, runs = resolve_device(self.args.device), self.contents.runs
        if self.contents.model:
            return DALLE.from_pretrained(self.contents.model, device)
        if not {"dvae", "transformer"} <= runs.keys():
            raise ValueError(
                "needs a dVAE and a transformer, which are not both in this folder; make a model directory:\n"
                "python scripts/sample.py --prompt WORDS --save-pretrained runs/model\n"
                "python scripts/report.py runs/model"
            )
        loaded = {
            kind: load_model(runs[kind].folder, kind, device) for kind in MODEL_REGISTRY if kind in runs
        }
        return DALLE.from_parts(loaded["dvae"], loaded["transformer"], loaded.get("clip"))

    @cached_property
    def dvae(self) -> ImageTokenizer:
        """The model's image tokenizer; without a whole model, that of the dVAE's run or directory."""
        try:
            return self.model.dvae
        except ValueError:
            run = self.contents.runs.get("dvae")
            folder = run.folder if run else self.contents.model
            if not self.args.sample or folder is None:
                raise
        return load_model(folder, "dvae", resolve_device(self.args.device)).model

    def run_config(self, kind: str) -> dict[str, Any]:
        """The configuration of a run; empty without one."""
        run = self.contents.runs.get(kind)
        return run.meta.get("config", {}) if run else {}

    @cached_property
    def val_batch(self) -> ImageTextBatch:
        """The first validation samples of the dataset that the dVAE, or the transformer, was trained on."""
        configs = [self.run_config(kind).get("data", {}) for kind in ("dvae", "transformer")]
        named = [config for config in configs if config.get("path")]
        if not named:
            raise ValueError("the folder does not say which images it was trained on")
        return first_samples(open_dataset(from_dict(DataConfig, named[0]), "held_out"), VAL_SAMPLES)

    @property
    def temperature(self) -> float:
        """--temperature, else that of an evaluation in the folder, the quick start's first, else 1."""
        if self.args.temperature is not None:
            return self.args.temperature
        reports = sorted(
            self.contents.evaluations.values(), key=lambda report: "caption_accuracy" not in report
        )
        values = [report.get("temperature") for report in reports]
        return next((float(value) for value in values if isinstance(value, int | float)), 1.0)

    @cached_property
    def generations(self) -> list[Generation]:
        """All candidates of each prompt, best first; by default for the first validation captions."""
        args, model = self.args, self.model
        prompts = list(args.prompts)
        if not prompts:
            try:
                prompts = sample_captions(self.val_batch, args.seed)[: args.captions]
            except ValueError as error:
                raise ValueError(f"no captions to sample for ({error}); give --prompts") from None
        n = args.best_of if model.scorer else min(SHOWN, args.best_of)
        return model.generate(
            prompts, n=n, best_of=n, seed=args.seed, temperature=self.temperature, truncate=True
        )

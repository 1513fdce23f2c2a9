"""Measure a model: by the judge of the drawn shapes, or its parts and images on held-out pairs.

python scripts/evaluate.py --model runs/quickstart/model --json report.json
python scripts/evaluate.py --model runs/my-model --parts dvae transformer clip --data.path my/images
python scripts/evaluate.py --parts rerank --clip ViT-B-32.pt --rank-by clip      ranked by a published CLIP
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dalle.clip import CLIPScorer, OpenClipScorer
from dalle.commands.evaluate_parts import PARTS, Bench
from dalle.config import cli_errors, parse
from dalle.data import DataConfig
from dalle.evals.blur import RADII
from dalle.evals.shapes_accuracy import caption_accuracy
from dalle.evals.zero_shot import TEMPLATES
from dalle.hub.registry import weights_hash
from dalle.io.files import make_directory, write_json
from dalle.pipelines.config import SamplingConfig
from dalle.pipelines.dalle import DALLE
from dalle.pretrained.openai_clip import load_scorer
from dalle.runs.args import ROOT, load_stage
from dalle.text import text_tokenizer_from_dict
from dalle.train.precision import resolve_device

Part = Literal["shapes", "dvae", "transformer", "clip", "images", "rerank"]


@dataclass(frozen=True)
class EvaluateArgs:
    """Measures a model on captions and images that training never saw."""

    model: Path = ROOT / "quickstart" / "model"
    """Model directory."""
    parts: tuple[Part, ...] = ("shapes",)
    """What to measure: shapes dvae transformer clip images rerank, one or several."""
    data: DataConfig = DataConfig(path="shapes")
    """Held-out images and captions of every part but shapes; the resolution is the model's."""
    pairs: int = 1000
    """Held-out pairs to read at most; the paper's distances are of 30,000."""
    captions: int = 200
    """Captions to draw for: of each kind for shapes, of the held-out pairs for images and rerank."""
    best_of: int = 16
    """Candidates of each caption; the paper draws 512."""
    temperature: float = 1.0
    """Of the samples; 1 as the paper."""
    chunk: int = 512
    """Images drawn at once for shapes."""
    batch: int = 32
    """Pairs measured at once."""
    blur: tuple[float, ...] = RADII
    """Radii of the Gaussian filters before features are taken (Figure 9)."""
    extractor: str | None = None
    """File of the Inception weights for FID and inception score; the word clip takes the CLIP's own space."""
    clip: Path | None = None
    """CLIP that measures in place of the model's own: a file of OpenAI's or open_clip's, or a run or model directory of
    this library; the ranking stays the model's unless --rank-by clip."""
    quick_gelu: bool | None = None
    """Activation of an open_clip file's CLIP, which no file tells: true for "-quickgelu" models, else false."""
    rank_by: Literal["model", "clip"] = "model"
    """Whose CLIP ranks the candidates: the model's own, or that of --clip, as scripts/sample.py does with one."""
    classes: Path | None = None
    """Text file with a class name a line, for images whose caption is their class: zero-shot and written words."""
    templates: tuple[str, ...] = TEMPLATES
    """Wordings of a class for the CLIP; {} is its name."""
    lpips_backbone: Path | None = None
    """torchvision's AlexNet, for LPIPS."""
    lpips_weights: Path | None = None
    """The weights of LPIPS for AlexNet."""
    statistics: Path = ROOT / "statistics"
    """Folder where the statistics of real images are kept from one run to the next."""
    seed: int = 0
    """Of captions, candidates and everything else that is drawn."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""
    json: Path | None = None
    """File for the report; printed too. A number that is not finite (the PSNR of an image that is kept exactly) is
    null there, and named with its value under not_finite."""

    def __post_init__(self):
        for name in ("captions", "best_of", "chunk", "pairs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        SamplingConfig(self.temperature)
        if self.json and self.json.is_dir():
            raise ValueError(f"{self.json} is a directory; expected the name of a file")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(
                f"parts must name one part or more, each once; got {' '.join(self.parts) or 'none'}"
            )
        if not self.blur or min(self.blur) < 0 or len(set(self.blur)) < len(self.blur):
            raise ValueError(f"blur must be radii of 0 or more, each once; got {self.blur}")
        if self.clip is None and self.rank_by == "clip":
            raise ValueError("--rank-by clip needs that CLIP; give it with --clip")
        if self.quick_gelu is not None and (self.clip is None or self.clip.is_dir()):
            raise ValueError("--quick-gelu is of a CLIP's file; give it with --clip")
        if (self.lpips_backbone is None) != (self.lpips_weights is None):
            raise ValueError("LPIPS needs both --lpips-backbone and --lpips-weights; give both, or neither")


def evaluate(run: EvaluateArgs) -> dict[str, Any]:
    """Measures each part; prints its numbers, and writes --json after each, so that a long run leaves what it has."""
    if run.json:
        make_directory(run.json.parent)
    device = resolve_device(run.device)
    model = DALLE.from_pretrained(run.model, device)
    report: dict[str, Any] = {"model": model.hash}
    clip = _clip(run, device) if run.clip else None
    if run.rank_by == "clip":
        model.scorer = clip
        report["ranked_by"] = weights_hash(clip.model)
    if model.scorer is None and {"shapes", "rerank"} & {*run.parts}:
        raise ValueError(
            f"{run.model} has no CLIP to rank with; train one and save the parts together, "
            "or give a published one by --clip FILE --rank-by clip"
        )
    report |= {name: getattr(run, name) for name in ("captions", "seed", "temperature", "best_of")}
    others = [part for part in run.parts if part != "shapes"]
    bench = Bench(run, model, device, clip) if others else None
    if bench:
        report["rests_on"] = bench.facts()
    for part in run.parts:
        found = _shapes(run, model) if part == "shapes" else {part: PARTS[part](bench)}
        report |= found
        for name, values in found.items():
            _tell(name, values)
        if run.json:
            write_json(run.json, finite(report))
    return finite(report)


def _clip(run: EvaluateArgs, device: torch.device) -> CLIPScorer | OpenClipScorer:
    """That of --clip; one of this library reads the text ids of the tokenizer that it was trained with."""
    if not run.clip.is_dir():
        return load_scorer(run.clip, device, run.quick_gelu)
    part = load_stage("clip", run.clip, device)
    return CLIPScorer(part.model, text_tokenizer_from_dict(part.links["text"]))


def finite(report: dict[str, Any]) -> dict[str, Any]:
    """The same report as JSON can hold it: numbers that are not finite are None, and told under "not_finite".

    "not_finite" is there only if there are such numbers: {"dvae.psnr": "inf"}.
    """
    told: dict[str, str] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner, f"{name}.{key}" if name else key) for key, inner in value.items()}
        if isinstance(value, float) and not math.isfinite(value):
            told[name] = str(value)
            return None
        return value

    made = plain(report, "")
    return made | ({"not_finite": told} if told else {})


def _shapes(run: EvaluateArgs, model: DALLE) -> dict[str, dict[str, float]]:
    """Both held-out sets of the shapes."""
    options = (run.captions, run.best_of, run.chunk, run.seed, run.temperature)
    return {split: caption_accuracy(model, split, *options)[0] for split in ("held_out", "new_pairs")}


def _tell(name: str, values: dict[str, Any]) -> None:
    """A line for each group of numbers."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    if numbers:
        shown = {
            key: str(value) if isinstance(value, int) else f"{value:.3f}" for key, value in numbers.items()
        }
        print(name, "  ".join(f"{key} {value}" for key, value in shown.items()))
    for key, inner in values.items():
        if isinstance(inner, dict):
            _tell(f"{name} {key}", inner)


def main() -> None:
    """Command line of evaluate."""
    with cli_errors():
        evaluate(parse(EvaluateArgs, description=__doc__))

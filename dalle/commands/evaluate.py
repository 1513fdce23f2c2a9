"""Measure a model on captions and images that training never saw.

python scripts/evaluate.py --model runs/quickstart/model --json report.json
python scripts/evaluate.py --model runs/my-model --metrics dvae transformer clip --data.path my/images
python scripts/evaluate.py --metrics rerank --clip ViT-B-32.pt --rerank-with clip   ranked by a published CLIP

| metrics | what is measured |
|---|---|
| shapes | share of images that show their caption, for a model of the shapes |
| dvae | likelihood, PSNR, SSIM, LPIPS, codebook usage |
| transformer | nats per token and bits per dimension |
| clip | retrieval, zero-shot accuracy, typographic attack |
| images | FID and inception score behind each blur, CLIP score (Figure 9) |
| rerank | what the best of 1, 2, 4, ... candidates is worth (Figure 9c) |
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

from dalle.config import check_positive, cli_errors, configuration, parse
from dalle.evals.config import EvalConfig
from dalle.io.text import flatten
from dalle.sampling import SamplingConfig

TOKEN_METRICS = ("dvae", "transformer")
Metric = Literal["shapes", "dvae", "transformer", "clip", "images", "rerank"]


@configuration
class EvaluateArgs(EvalConfig):
    """Measures a model on captions and images that training never saw."""

    model: Path = Path("runs/quickstart/model")
    """Model directory."""
    metrics: tuple[Metric, ...] = ("shapes",)
    """One or more of shapes dvae transformer clip images rerank."""
    clip: Path | None = None
    """CLIP that measures in place of the model's own: a file of OpenAI's or open_clip's, or a run or model
    directory of this library. It ranks only with --rerank-with clip."""
    quick_gelu: bool | None = None
    """Activation of an open_clip file's CLIP, which files do not record: true for "-quickgelu" models."""
    rerank_with: Literal["model", "clip"] = "model"
    """The CLIP that ranks the candidates: the model's own, or that of --clip."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first available."""
    json: Path | None = None
    """File for the report, which is also printed; numbers not finite are null and named under nonfinite."""

    def __post_init__(self):
        check_positive(self, "num_prompts", "best_of", "chunk", "num_samples", "batch")
        SamplingConfig(self.temperature)
        if self.json and self.json.is_dir():
            raise ValueError(f"{self.json} is a directory; expected a file name")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics must be one or more, each once; got {self.metrics}")
        radii = self.blur_radii
        if not radii or min(radii) < 0 or len(set(radii)) < len(radii):
            raise ValueError(f"blur-radii must be 0 or more, each once; got {radii}")
        if self.clip is None and self.rerank_with == "clip":
            raise ValueError("--rerank-with clip needs a CLIP; give it with --clip")
        if self.quick_gelu is not None and (self.clip is None or self.clip.is_dir()):
            raise ValueError("--quick-gelu is for the file of a CLIP; give it with --clip")


def evaluate(args: EvaluateArgs) -> dict[str, Any]:
    """Computes and prints each metric; writes --json after each, for a run that is interrupted."""
    from dalle.clip import CLIPScorer
    from dalle.evals.context import EvalContext
    from dalle.evals.networks import INCEPTION_FILE
    from dalle.evals.suite import METRICS
    from dalle.hub.registry import weights_hash
    from dalle.io.files import prepare_file, write_json
    from dalle.pipelines.glide import GLIDE
    from dalle.pipelines.open import open_pipeline
    from dalle.pretrained.openai_clip import load_scorer
    from dalle.runs.inputs import load_stage
    from dalle.text import text_tokenizer_from_dict
    from dalle.train.precision import resolve_device

    if args.json:
        prepare_file(args.json)
    device = resolve_device(args.device)
    model = open_pipeline(str(args.model), device)
    if isinstance(model, GLIDE) and (other := [name for name in args.metrics if name in TOKEN_METRICS]):
        raise ValueError(f"{args.model} is a GLIDE, without tokens: it has no metrics {' '.join(other)}")
    report: dict[str, Any] = {"model": model.hash}
    clip = None
    if args.clip and args.clip.is_dir():
        loaded = load_stage("clip", args.clip, device)
        clip = CLIPScorer(loaded.model, text_tokenizer_from_dict(loaded.inputs["text"]))
    elif args.clip:
        clip = load_scorer(args.clip, device, args.quick_gelu)
    if args.rerank_with == "clip":
        model.scorer = clip
        report["ranked_by"] = weights_hash(clip.model)
    if model.scorer is None and args.best_of > 1 and {"shapes", "rerank"} & {*args.metrics}:
        raise ValueError(
            f"{args.model} has no CLIP to rank with; train one and save the model with it, give a published "
            "one by --clip FILE --rerank-with clip, or take --best-of 1"
        )
    report |= {name: getattr(args, name) for name in ("num_prompts", "seed", "temperature", "best_of")}
    context = EvalContext(args, model, clip)
    if context.clip is None and ("clip" in args.metrics or args.feature_extractor == "clip"):
        raise ValueError("the model has no CLIP to measure with; give OpenAI's by --clip FILE")
    if "images" in args.metrics and not context.extractor:
        raise ValueError(INCEPTION_FILE)
    report["provenance"] = context.provenance()
    for name in args.metrics:
        report[name] = METRICS[name](context)
        _print(name, report[name])
        if args.json:
            write_json(args.json, finite(report))
    return finite(report)


def finite(report: dict[str, Any]) -> dict[str, Any]:
    """The report with None for numbers that are not finite, and {"nonfinite": {"dvae.psnr": "inf"}}."""
    numbers = {name: value for name, value in flatten(report).items() if isinstance(value, float)}
    nonfinite = {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}
    result = json.loads(json.dumps(report), parse_constant=lambda word: None)
    return result | {"nonfinite": nonfinite} if nonfinite else result


def _print(name: str, values: dict[str, Any]) -> None:
    """A line for each group of numbers."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    texts = [f"{k} {v}" if isinstance(v, int) else f"{k} {v:.3f}" for k, v in numbers.items()]
    if texts:
        print(name, "  ".join(texts))
    for key, inner in values.items():
        if isinstance(inner, dict):
            _print(f"{name} {key}", inner)


def main() -> None:
    """Command line of evaluate."""
    with cli_errors():
        evaluate(parse(EvaluateArgs, description=__doc__))

"""Agreement of samples of one seed across batch sizes, number formats and devices.

For one batch size, format and device, samples are equal bit for bit. Elsewhere the last bits of a matrix
product may differ, which rarely changes a token, and then the rest of the image. The change of the model is
the mean log-likelihood that samples of the reference lose, in nats per token: at temperature 1 an estimate of
the KL divergence.

python scripts/studies/reproducibility.py --model runs/quickstart/model --candidates 64
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.benchmarks.common import finish
from dalle.config import cli_errors, configuration, parse
from dalle.pipelines.dalle import DALLE
from dalle.train.precision import Precision, resolve_device, resolve_precision


@configuration
class Setting:
    """How images are sampled."""

    batch: int
    precision: str
    device: str
    int8: bool = False

    def __str__(self):
        matrices = ", int8 matrices" if self.int8 else ""
        return f"batch {self.batch}, {self.precision}{matrices}, {self.device}"


@configuration
class ReproducibilityStudy:
    """Samples the same candidates in several settings and counts the images whose tokens are all equal."""

    model: Path = Path("runs/quickstart/model")
    """Model directory."""
    prompts: tuple[str, ...] = (
        "a red circle above a blue square on a white background",
        "a small green triangle at the top left on a black background",
    )
    """Captions."""
    candidates: int = 64
    """Candidates of each caption."""
    batch: tuple[int, ...] = (16, 1, 8, 64)
    """Batch sizes; the first is the reference."""
    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """Number formats at the first batch size, each also with int8 matrices; the first is the reference."""
    devices: tuple[str, ...] = ("auto",)
    """Devices at the first batch size and format; the first is the reference."""
    seed: int = 0
    """Sampling seed."""
    json: Path | None = None
    """File for the report."""

    def __post_init__(self):
        if len(self.prompts) * self.candidates < 2:
            raise ValueError("a standard error needs two images or more; raise candidates")


def reproducibility(args: ReproducibilityStudy) -> dict[str, Any]:
    """Fractions of images and tokens equal to the reference's, and nats per token lost to other formats."""
    reference, *others = settings(args)
    model = DALLE.from_pretrained(args.model, reference.device)
    tokens = sample(args, model, reference)
    exact, results = nats(args, model, reference, tokens), {}
    for setting in others:
        same = sample(args, model, setting) == tokens
        line = {
            "equal_images": same.all(dim=-1).float().mean().item(),
            "equal_tokens": same.float().mean().item(),
        }
        if (setting.batch, setting.device) == (reference.batch, reference.device):
            lost = exact - nats(args, model, setting, tokens)
            line["nats_lost_per_token"] = lost.mean().item()
            line["standard_error"] = lost.std().item() / len(lost) ** 0.5
        results[str(setting)] = line
    report = {
        "reference": str(reference),
        "images": len(args.prompts) * args.candidates,
        "tokens_per_image": tokens.shape[-1],
        "model_hash": model.hash,
        "results": results,
    }
    return finish(report, args.json, torch.device(reference.device))


def settings(args: ReproducibilityStudy) -> list[Setting]:
    """The reference, then those that differ from it in one respect."""
    devices = [resolve_device(device) for device in args.devices]
    formats = [resolve_precision(precision, devices[0]) for precision in args.precision]
    first = Setting(args.batch[0], formats[0], devices[0].type)
    candidates = [
        *(replace(first, batch=batch) for batch in args.batch),
        *(replace(first, precision=name) for name in formats),
        *(replace(first, precision=name, int8=True) for name in formats),
        *(replace(first, device=device.type) for device in devices),
    ]
    return list(dict.fromkeys(candidates))


def sample(args: ReproducibilityStudy, model: DALLE, setting: Setting) -> Tensor:
    """Image tokens of all candidates, int64 (prompts, candidates, h * w)."""
    if setting.device != model.device.type:
        model = DALLE.from_pretrained(args.model, device=setting.device)
    model = model.to_precision(setting.precision, setting.int8)
    options = {"n": args.candidates, "best_of": args.candidates, "batch_size": setting.batch}
    samples = []
    for prompt in args.prompts:
        generation = model.generate(prompt, seed=args.seed, **options)
        order = torch.tensor(generation.candidates).argsort()
        samples.append(generation.image_tokens[order].cpu())
    return torch.stack(samples)


def nats(args: ReproducibilityStudy, model: DALLE, setting: Setting, tokens: Tensor) -> Tensor:
    """Log-likelihood per token of each image, float (prompts * candidates,)."""
    rounded = model.to_precision(setting.precision, setting.int8)
    pairs = zip(args.prompts, tokens, strict=True)
    images = [rounded.log_likelihood(prompt, candidates).image for prompt, candidates in pairs]
    return torch.cat(images).double() / tokens.shape[-1]


if __name__ == "__main__":
    with cli_errors():
        reproducibility(parse(ReproducibilityStudy, description=__doc__))

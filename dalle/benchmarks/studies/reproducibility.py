"""Whether the same seed gives the same image when the batch, the number format or the device is another.

For one batch, format and device it does, to the bit (dalle/pipelines/best_of_n.py). Elsewhere a matrix product's last bits may
differ; once in a while they decide which token is drawn, and the rest of that image then follows another way.

How much another number format changes the model itself is told in nats a token: the reference draws images, and their
mean log-likelihood by the reference less that by the other is, at temperature 1, the Kullback-Leibler divergence of the
two models.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dalle.benchmarks.common import hardware, save_report
from dalle.io.files import make_directory
from dalle.pipelines.best_of_n import CandidateBatch, CandidateSampler, SamplingConfig
from dalle.pipelines.dalle import DALLE
from dalle.train.precision import Precision, resolve_device, resolve_precision


@dataclass(frozen=True)
class Way:
    """One way to draw."""

    batch: int
    precision: str
    device: str
    int8: bool = False

    def __str__(self):
        return f"batch {self.batch}, {self.precision}{', int8 matrices' * self.int8}, {self.device}"


@dataclass(frozen=True)
class AgreementBenchmark:
    """Draws the same candidates in several ways and counts the images whose tokens are all the same."""

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
    """Rows of a step, each in turn; the first is the reference."""
    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """Number formats, each in turn at the first batch; the first is the reference."""
    int8: bool = True
    """Also with matrices in 8 bits, at the first batch and in each number format."""
    devices: tuple[str, ...] = field(default=("auto",))
    """Devices, each in turn at the first batch and format; the first is the reference."""
    temperature: float = 1.0
    """Of the drawing."""
    seed: int = 0
    """Of the drawing."""
    json: Path | None = None
    """File for the report; printed too."""

    def __post_init__(self):
        if not (self.prompts and self.batch and self.precision and self.devices):
            raise ValueError("prompts, batch, precision and devices must each name at least one")
        if min(self.candidates, *self.batch) < 1:
            raise ValueError("candidates and batch must be positive")
        if len(self.prompts) * self.candidates < 2:
            raise ValueError(
                "two images or more are needed to tell an error; raise candidates, or give more prompts"
            )


def benchmark_agreement(run: AgreementBenchmark) -> dict[str, Any]:
    """Shares of images and of tokens that equal the reference's, and nats lost by number format; writes --json.

    Raises:
        ValueError: no such model, settings out of range, or a device that is not there.
    """
    if run.json:
        make_directory(run.json.parent)
    reference, *others = ways(run)
    model = DALLE.from_pretrained(run.model, reference.device)
    expected = drawn(run, model, reference)
    report = {
        "reference": str(reference),
        "images": len(run.prompts) * run.candidates,
        "tokens_a_image": model.transformer.layout.num_image_tokens,
        "equal": {str(way): equal_shares(drawn(run, model, way), expected) for way in others},
        "nats_lost_a_token": nats_lost(run, model, reference, others, expected),
        "temperature": run.temperature,
        "seed": run.seed,
        "model_hash": model.hash,
        "hardware": hardware(torch.device(reference.device)),
    }
    save_report(report, run.json)
    print(f"{report['images']} images of {report['tokens_a_image']} tokens; equal to {reference}:")
    for name, shares in report["equal"].items():
        line = f"  {name:36}images {shares['images']:.3f}  tokens {shares['tokens']:.3f}"
        lost = report["nats_lost_a_token"].get(name)
        print(line if lost is None else f"{line}  nats lost a token {lost[0]:.2g} (+- {lost[1]:.1g})")
    return report


def ways(run: AgreementBenchmark) -> list[Way]:
    """The reference, then those that differ from it in one thing."""
    devices = [resolve_device(device) for device in run.devices]
    first = Way(run.batch[0], resolve_precision(run.precision[0], devices[0]), devices[0].type)
    found = [replace(first, batch=batch) for batch in run.batch]
    formats = [
        replace(first, precision=resolve_precision(precision, devices[0])) for precision in run.precision
    ]
    found += formats + [replace(way, int8=True) for way in formats if run.int8]
    found += [replace(first, device=device.type) for device in devices]
    return list(dict.fromkeys(found))


def drawn(run: AgreementBenchmark, model: DALLE, way: Way) -> Tensor:
    """Image tokens of all candidates, int64 (prompts, candidates, h * w), drawn in one way."""
    if way.device != model.device.type:
        model = DALLE.from_pretrained(run.model, device=way.device)
    model = model.to_precision(way.precision, way.int8)
    text = model.text_tokens(run.prompts)
    settings = SamplingConfig(temperature=run.temperature, batch=way.batch)
    drawer = CandidateSampler(model.dvae, model.transformer, None, settings)
    found = []
    for caption in tqdm(range(len(run.prompts)), desc=str(way), unit="caption", disable=None):
        for first in range(0, run.candidates, way.batch):
            block = CandidateBatch([caption], range(first, first + way.batch), way.batch)
            *_, tokens = drawer.tokens(run.prompts, text, None, run.seed, block)
            found.append(tokens[0, : run.candidates - first].cpu())
    return torch.cat(found).view(len(run.prompts), run.candidates, -1)


def equal_shares(tokens: Tensor, expected: Tensor) -> dict[str, float]:
    """Of images whose tokens are all equal, and of single tokens."""
    same = tokens == expected
    return {"images": same.all(dim=-1).float().mean().item(), "tokens": same.float().mean().item()}


def nats_lost(
    run: AgreementBenchmark, model: DALLE, reference: Way, others: list[Way], tokens: Tensor
) -> dict[str, tuple[float, float]]:
    """By number format: how much less likely the reference's images are in it, and the standard error, a token."""

    def nats(way: Way) -> Tensor:  # of each image's tokens
        rounded = model.to_precision(way.precision, way.int8)
        found = [rounded.log_likelihood(*one).image for one in zip(run.prompts, tokens, strict=True)]
        return torch.cat(found).double() / tokens.shape[-1]

    formats = [way for way in others if (way.batch, way.device) == (reference.batch, reference.device)]
    expected = nats(reference)
    lost = {str(way): expected - nats(way) for way in formats}
    return {name: (nats.mean().item(), nats.std().item() / len(nats) ** 0.5) for name, nats in lost.items()}

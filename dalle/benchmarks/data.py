"""How fast data come: images and tokens a second, and how long a training step waits for them.

A case is one source, one number of workers and one resolution, or the token cache. It is timed twice: batches
alone, as fast as they come, and batches with a training step after each, where the wait is what is left of a
batch's time when the step is over. Times on a shared machine swing, so every round times each case once, and the
medians of the rounds and of the ratios within a round are reported.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.benchmarks.common import Stepper, hardware, save_report, seconds_of
from dalle.commands.train_transformer import TokenBatches, TrainTransformerArgs
from dalle.data import DataConfig, Loader, StepOfPairs, TokenCache, open_dataset
from dalle.data.token_cache import TokenCacheSpec
from dalle.data.token_writer import TokenWriter
from dalle.dvae import DVAEConfig
from dalle.dvae.objective import DVAEObjective
from dalle.io.files import make_directory
from dalle.layout import TokenLayout
from dalle.runs.args import load_text_input
from dalle.shapes.dataset import ShapesDataset
from dalle.text import BPETokenizer, TextTokenizerConfig, train_text_tokenizer
from dalle.train import TrainConfig
from dalle.train.precision import Precision, resolve_device, resolve_precision
from dalle.train.step import to_device
from dalle.transformer import TransformerConfig
from dalle.transformer.objective import TransformerObjective
from dalle.types import ImageTextBatch

STEPS = 10**6
"""Workers read ahead up to this step, which is never reached."""


@dataclass(frozen=True)
class DataBenchmark:
    """Times sources of images and the token cache, alone and with a training step."""

    sources: tuple[str, ...] = ("shapes",)
    """Images and captions to compare, each as --data.path takes it; ratios are against the first case."""
    workers: tuple[int, ...] = (0, 1)
    """Processes that read ahead."""
    resolutions: tuple[int, ...] = (64,)
    """Pixels on a side."""
    data: DataConfig = DataConfig()
    """What else is set of the sources."""
    dvae: DVAEConfig = DVAEConfig(widths=(64, 128, 256), downsample_factor=4, vocab_size=1024)
    """The model whose step the images are read for."""
    model: TransformerConfig = TransformerConfig(depth=8, heads=8)
    """The model whose step the tokens are read for."""
    tokens: Path | None = None
    """Token cache of the model's grid; made up unless given."""
    tokenizer: Path | None = None
    """Text tokenizer of its captions; made up unless given."""
    batch_size: int = 8
    """Images in a step."""
    batches: int = 4
    """Batches timed in a round, alone and then with a step each."""
    rounds: int = 3
    """Times that every case is measured."""
    precision: Precision = "auto"
    """Of the steps: fp32, bf16 or fp16; auto takes bf16 where the device has it in hardware."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""
    json: Path | None = None
    """File for the report; printed too."""

    def __post_init__(self):
        if min(self.batch_size, self.batches, self.rounds) < 1:
            raise ValueError("batch-size, batches and rounds must be positive")
        if not (self.sources and self.workers and self.resolutions):
            raise ValueError("sources, workers and resolutions must name at least one each")
        if min(self.workers) < 0:
            raise ValueError(f"workers must be 0 or more, got {min(self.workers)}")


@dataclass(frozen=True)
class Case:
    """One thing to time."""

    name: str
    """What is read, in words."""
    unit: str
    """What is counted, images or tokens."""
    count: int
    """How many of them are in a batch."""
    load: Callable[[], Loader]
    """Opens the loader of batches."""
    step: Stepper
    """What is done with a batch."""


def benchmark_data(run: DataBenchmark) -> dict[str, Any]:
    """Times every case; writes --json."""
    if run.json:
        make_directory(run.json.parent)
    device = resolve_device(run.device)
    precision = resolve_precision(run.precision, device)
    with ExitStack() as stack:
        cases = [*_images(run, device, precision), stack.enter_context(_tokens(run, device, precision))]
        rounds = [
            {case.name: measure(case, run.batches, device) for case in cases} for _ in range(run.rounds)
        ]
    report = {
        "batch_size": run.batch_size,
        "precision": precision,
        "cases": {case.name: line(case, rounds, cases[0].name) for case in cases},
        "hardware": hardware(device),
    }
    save_report(report, run.json)
    _print(report)
    return report


def _images(run: DataBenchmark, device: torch.device, precision: str) -> list[Case]:
    """Every source with every resolution and number of workers."""
    step = Stepper("dvae", run.dvae, DVAEObjective(), device, precision)
    cases = []
    for source in run.sources:
        for resolution in run.resolutions:
            pairs = open_dataset(replace(run.data, path=source, resolution=resolution))
            task = StepOfPairs(pairs, run.batch_size, 0, "transformer", pixels_of)
            for workers in run.workers:
                name = f"{source}, {resolution} x {resolution}, {workers} workers"
                cases.append(
                    Case(name, "images", run.batch_size, _loader(task, workers, run.data.prefetch), step)
                )
    return cases


def _loader(task: StepOfPairs, workers: int, prefetch: int) -> Callable[[], Loader]:
    return lambda: Loader(task, STEPS, workers, prefetch, lambda step, item: item[0])


def pixels_of(batch: ImageTextBatch, step: int) -> Tensor:
    """(B, 3, R, R): what a dVAE is trained on."""
    return torch.from_numpy(batch.pixels)


@contextmanager
def _tokens(run: DataBenchmark, device: torch.device, precision: str) -> Iterator[Case]:
    """The token cache, read as the transformer's training does."""
    with tempfile.TemporaryDirectory() as folder:
        layout = run.model.layout
        captions = ShapesDataset(16).captions(range(2000))
        text = load_text_input(run.tokenizer) if run.tokenizer else _made_up_text(captions, layout.text_vocab)
        cache = (
            TokenCache(run.tokens) if run.tokens else made_up_cache(Path(folder, "tokens"), layout, captions)
        )
        training = TrainTransformerArgs(
            model=run.model, train=TrainConfig(batch_size=run.batch_size), eval_samples=1
        )
        batches = TokenBatches(cache, text, layout, training)
        step = Stepper("transformer", run.model, TransformerObjective(), device, precision)
        yield Case(
            "token cache", "tokens", run.batch_size * layout.seq_len, lambda: Loader(batches, STEPS), step
        )


def _made_up_text(captions: list[list[str]], vocab_size: int) -> BPETokenizer:
    words = (texts[0] for texts in captions)
    return train_text_tokenizer(words, TextTokenizerConfig(vocab_size=min(vocab_size, 1000)))


def made_up_cache(folder: Path, layout: TokenLayout, captions: list[list[str]]) -> TokenCache:
    """A cache of random tokens, one row for each list of captions."""
    plan = TokenCacheSpec(
        "random", "random", (layout.rows, layout.columns), layout.image_vocab, len(captions), shard=500
    )
    writer = TokenWriter(folder, plan)
    rng = np.random.default_rng(0)
    for shard in writer.missing():
        numbers = plan.numbers(shard)
        tokens = rng.integers(plan.vocab, size=(len(numbers), 1, layout.num_image_tokens))
        writer.write(shard, tokens, numbers, [captions[number] for number in numbers])
    return writer.finish()


def measure(case: Case, batches: int, device: torch.device) -> dict[str, float]:
    """Seconds of a batch alone, of a step, and of the wait for a batch before a step."""
    waits, steps = [], []
    with case.load() as load:
        load(0)  # workers start, files open
        alone = seconds_of(lambda: [load(i) for i in range(1, batches + 1)], device) / batches
        for i in range(batches + 1, 2 * batches + 1):
            started = time.perf_counter()
            batch = to_device(load(i), device)
            waits.append(time.perf_counter() - started)
            steps.append(seconds_of(lambda batch=batch: case.step(batch), device))
    return {"batch": alone, "wait": statistics.fmean(waits), "step": statistics.fmean(steps)}


def line(case: Case, rounds: list[dict[str, dict[str, float]]], first: str) -> dict[str, float]:
    """A case's medians over the rounds."""
    times = {
        name: statistics.median(times[case.name][name] for times in rounds)
        for name in ("batch", "wait", "step")
    }
    ratios = {
        "times_as_fast_as_the_first": statistics.median(
            t[first]["batch"] / t[case.name]["batch"] for t in rounds
        ),
        "times_as_fast_as_its_step": statistics.median(
            t[case.name]["step"] / t[case.name]["batch"] for t in rounds
        ),
    }
    return {
        f"{case.unit}_per_second": case.count / times["batch"],
        "seconds_a_batch": times["batch"],
        "seconds_a_step": times["step"],
        "seconds_waited": times["wait"],
        "share_waited": times["wait"] / (times["wait"] + times["step"]),
        **ratios,
    }


def _print(report: dict[str, Any]) -> None:
    print(f"batches of {report['batch_size']}, steps in {report['precision']}, {report['hardware']}")
    width = max(map(len, report["cases"]))
    for name, numbers in report["cases"].items():
        rate = next(iter(numbers))
        print(
            f"  {name:{width}}  {numbers[rate]:9.4g} {rate.replace('_per_', '/')}  "
            f"{numbers['times_as_fast_as_the_first']:7.3g} x the first  "
            f"{numbers['times_as_fast_as_its_step']:7.3g} x its step ({numbers['seconds_a_step']:.3g} s)  "
            f"waits {numbers['share_waited']:.1%}"
        )

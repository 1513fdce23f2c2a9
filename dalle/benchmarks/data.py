"""Data loading throughput: images and tokens per second, and the time a training step waits for data.

A case is the token cache or a source and a resolution, with a number of workers. It is timed twice: batches
alone, and with a training step after each, where the wait is the rest of a batch's time when the step is
over. Every round times each case once; medians of the rounds and of the ratios within a round are reported.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from dalle.benchmarks.common import Stepper, finish, seconds_of
from dalle.benchmarks.config import DataBenchmark
from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.data import BatchReader, ImageTextLoader, Loader, open_dataset
from dalle.data.token_cache import TokenCacheSpec, TokenWriter
from dalle.dvae.objective import DVAEObjective
from dalle.runs.batches import DVAEBatch, TokenBatches, TokenLoader
from dalle.shapes.dataset import ShapesDataset
from dalle.text import TextTokenizerConfig, train_text_tokenizer
from dalle.train import TrainConfig
from dalle.train.precision import resolve_device, resolve_precision
from dalle.train.step import to_device
from dalle.transformer.objective import TransformerObjective

STEPS = 10**6  # never reached; workers read ahead up to it


@dataclass(frozen=True)
class Case:
    """One way of loading data, in batches of `count` units (images or tokens), and its training step."""

    name: str
    unit: str
    count: int
    load: Callable[[], Loader]
    step: Stepper


def benchmark_data(args: DataBenchmark) -> dict[str, Any]:
    """Times every case."""
    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    with _token_cases(args, device, precision) as token_cases:
        cases = [*_image_cases(args, device, precision), *token_cases]
        rounds = [[measure(case, args.num_batches, device) for case in cases] for _ in range(args.rounds)]
    times = np.moveaxis(np.array(rounds), 0, -1)  # (cases, 3, rounds)
    results = {case.name: summarize(case, times[i], times[0, 0]) for i, case in enumerate(cases)}
    report = {"batch_size": args.batch_size, "precision": precision, "results": results}
    return finish(report, args.json, device)


def _image_cases(args: DataBenchmark, device: torch.device, precision: str) -> list[Case]:
    """Every source at every resolution, with every number of workers."""
    step = Stepper("dvae", args.dvae, DVAEObjective(), device, precision)
    cases = []
    for source, resolution in itertools.product(args.sources, args.resolutions):
        pairs = open_dataset(replace(args.data, path=source, resolution=resolution))
        task = BatchReader(pairs, args.batch_size, 0, "transformer", DVAEBatch(None, 0))
        for workers in args.workers:
            name = f"{source}, {resolution} x {resolution}, {workers} workers"
            loader = partial(ImageTextLoader, task, STEPS, workers, args.data.prefetch)
            cases.append(Case(name, "images", args.batch_size, loader, step))
    return cases


@contextmanager
def _token_cases(args: DataBenchmark, device: torch.device, precision: str) -> Iterator[list[Case]]:
    """A cache of random tokens, read as in the training of the transformer, with every number of workers."""
    layout, captions = args.config.layout, ShapesDataset(16).captions(range(2000))
    config = TextTokenizerConfig(vocab_size=min(layout.text_vocab, 1000))
    text = train_text_tokenizer((texts[0] for texts in captions), config)
    spec = TokenCacheSpec(
        "random", "random", (layout.rows, layout.columns), layout.image_vocab, len(captions), shard=500
    )
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        writer = TokenWriter(Path(folder, "tokens"), spec)
        for shard in writer.missing():
            numbers = spec.numbers(shard)
            tokens = rng.integers(spec.vocab, size=(len(numbers), 1, layout.num_image_tokens))
            writer.write(shard, tokens, [captions[number] for number in numbers])
        cache, train = writer.finish(), TrainConfig(batch_size=args.batch_size)
        training = TrainTransformerArgs(steps=STEPS, model=args.config, train=train, eval_samples=1)
        step = Stepper("transformer", args.config, TransformerObjective(), device, precision)
        cases = []
        for workers in args.workers:
            run = replace(training, data=replace(args.data, workers=workers))
            loader = partial(TokenLoader, TokenBatches(cache, text, layout, run))
            name, count = f"token cache, {workers} workers", args.batch_size * layout.seq_len
            cases.append(Case(name, "tokens", count, loader, step))
        yield cases


def measure(case: Case, num_batches: int, device: torch.device) -> tuple[float, float, float]:
    """Seconds of a batch alone, of the wait for the batch of a training step, and of the step."""
    waits, steps = [], []
    with case.load() as load:
        load(0)  # workers start, files open
        alone = seconds_of(lambda: [load(i) for i in range(1, num_batches + 1)], device) / num_batches
        for i in range(num_batches + 1, 2 * num_batches + 1):
            started = time.perf_counter()
            batch = to_device(load(i), device)
            waits.append(time.perf_counter() - started)
            steps.append(seconds_of(lambda batch=batch: case.step(batch), device))
    return alone, fmean(waits), fmean(steps)


def summarize(case: Case, times: np.ndarray, first: np.ndarray) -> dict[str, float]:
    """A case's medians over the rounds, from what `measure` gives of each, and batches of the first case."""
    batches, waits, steps = times
    batch, wait, step = median(batches), median(waits), median(steps)
    return {
        f"{case.unit}_per_sec": case.count / batch,
        "batch_time": batch,
        "step_time": step,
        "data_time": wait,
        "data_time_frac": wait / (wait + step),
        "speedup_vs_first": median(first / batches),
        "speedup_vs_step": median(steps / batches),
    }

"""Benchmark of data loading: rates, ratios and waits of each case."""

from dataclasses import replace

import numpy as np

from dalle.benchmarks.config import DataBenchmark
from dalle.benchmarks.data import Case, benchmark_data, summarize
from dalle.dvae import DVAEConfig
from dalle.transformer import TransformerConfig

CONFIG = TransformerConfig(2, 2, 8, 6, (4, 4), 11, 13, conv_kernel=3, attention_backend="dense")
SMALL_DVAE = DVAEConfig(widths=(4, 8), blocks_per_group=1, downsample_factor=2, vocab_size=8, codebook_dim=4)
DATA = DataBenchmark(
    workers=(0, 1),
    resolutions=(16, 32),
    dvae=SMALL_DVAE,
    model=replace(CONFIG, text_vocab=400, text_len=20),
    batch_size=2,
    num_batches=2,
    rounds=2,
    precision="fp32",
    device="cpu",
)


def test_the_report_has_every_case_with_its_ratios_and_its_wait():
    report = benchmark_data(DATA)
    names = [f"shapes, {r} x {r}, {workers} workers" for r in (16, 32) for workers in (0, 1)]
    tokens = [f"token cache, {workers} workers" for workers in (0, 1)]
    assert list(report["results"]) == [*names, *tokens]
    assert report["results"][names[0]]["speedup_vs_first"] == 1
    for name, numbers in report["results"].items():
        assert ("tokens_per_sec" if name in tokens else "images_per_sec") in numbers
        assert min(numbers.values()) > 0
        assert 0 < numbers["data_time_frac"] < 1


def test_ratios_are_taken_within_a_round():
    """A machine that is ten times slower in one round changes no ratio."""
    slowness = np.array([1, 10, 1])
    times = np.outer([2.0, 1.0, 3.0], slowness)  # of a batch alone, the wait for one, and a step
    numbers = summarize(Case("b", "images", 6, None, None), times, 4.0 * slowness)
    assert (numbers["images_per_sec"], numbers["data_time_frac"]) == (3, 0.25)
    assert (numbers["speedup_vs_first"], numbers["speedup_vs_step"]) == (2, 1.5)

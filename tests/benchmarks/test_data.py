"""Benchmark of data loading: rates, ratios and waits of each case."""

from dataclasses import replace

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
    assert list(report["results"]) == [*names, "token cache"]
    assert report["results"][names[0]]["speedup_vs_first"] == 1
    for name, numbers in report["results"].items():
        assert ("tokens_per_sec" if name == "token cache" else "images_per_sec") in numbers
        assert min(numbers.values()) > 0
        assert 0 < numbers["data_time_frac"] < 1


def test_ratios_are_taken_within_a_round():
    """A machine that is ten times slower in one round changes no ratio."""
    case = Case("b", "images", 6, None, None)
    times = {"a": {"batch": 4.0, "wait": 1.0, "step": 1.0}, "b": {"batch": 2.0, "wait": 1.0, "step": 3.0}}
    slow = {name: {key: 10 * value for key, value in numbers.items()} for name, numbers in times.items()}
    numbers = summarize(case, [times, slow, times], "a")
    assert numbers["images_per_sec"] == 3
    assert numbers["speedup_vs_first"] == 2
    assert numbers["speedup_vs_step"] == 1.5
    assert numbers["data_time_frac"] == 0.25

"""The benchmark of data: each case with its rate, its ratios and the wait it causes."""

import json
from dataclasses import replace

import pytest

from dalle.benchmarks.data import Case, DataBenchmark, benchmark_data, line
from dalle.dvae import DVAEConfig
from dalle.transformer import TransformerConfig

CONFIG = TransformerConfig(2, 2, 8, 6, (4, 4), 11, 13, conv_kernel=3, backend="dense")
SMALL_DVAE = DVAEConfig(widths=(4, 8), blocks_per_group=1, downsample_factor=2, vocab_size=8, codebook_dim=4)
DATA = DataBenchmark(
    workers=(0, 1),
    resolutions=(16, 32),
    dvae=SMALL_DVAE,
    model=replace(CONFIG, text_vocab=400, text_len=20),
    batch_size=2,
    batches=2,
    rounds=2,
    precision="fp32",
    device="cpu",
)


def test_the_report_has_every_case_with_its_ratios_and_its_wait(tmp_path):
    path = tmp_path / "report.json"
    benchmark_data(replace(DATA, json=path))
    report = json.loads(path.read_text(encoding="utf-8"))
    names = [f"shapes, {r} x {r}, {workers} workers" for r in (16, 32) for workers in (0, 1)]
    assert list(report["cases"]) == [*names, "token cache"]
    assert report["cases"][names[0]]["times_as_fast_as_the_first"] == 1
    for name, numbers in report["cases"].items():
        assert ("tokens_per_sec" if name == "token cache" else "images_per_second") in numbers
        assert min(numbers.values()) > 0
        assert 0 < numbers["share_waited"] < 1


def test_ratios_are_taken_within_a_round():
    """A machine that is ten times slower in one round changes no ratio."""
    case = Case("b", "images", 6, None, None)
    times = {"a": {"batch": 4.0, "wait": 1.0, "step": 1.0}, "b": {"batch": 2.0, "wait": 1.0, "step": 3.0}}
    slow = {name: {key: 10 * value for key, value in numbers.items()} for name, numbers in times.items()}
    numbers = line(case, [times, slow, times], "a")
    assert numbers["images_per_second"] == 3
    assert numbers["times_as_fast_as_the_first"] == 2
    assert numbers["times_as_fast_as_its_step"] == 1.5
    assert numbers["share_waited"] == 0.25


def test_a_given_cache_and_tokenizer_are_read(chain, tiny_runs):
    run = replace(
        DATA, tokens=chain / "tokens", tokenizer=chain / "text", workers=(0,), resolutions=(16,), rounds=1
    )
    report = benchmark_data(replace(run, model=tiny_runs.transformer.model))
    assert report["cases"]["token cache"]["tokens_per_sec"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"batches": 0}, "must be positive"),
        ({"sources": ()}, "must name at least one"),
        ({"workers": (-1,)}, "workers must be 0 or more, got -1"),
    ],
)
def test_bad_settings_of_the_data_benchmark_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        DataBenchmark(**words)

"""The benchmarks run and report, and operations are counted right."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle.dvae import DVAEConfig
from dalle.stages.benchmark import TrainBenchmark, benchmark_training
from dalle.stages.benchmark_data import Case, DataBenchmark, benchmark_data, line
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.losses import cross_entropies
from dalle.transformer.sizes import training_flops

CONFIG = TransformerConfig(2, 2, 8, 6, (4, 4), 11, 13, conv_kernel=3, backend="dense")


def test_operations_equal_those_that_torch_counts():
    """Torch counts every pair of the dense attention; ours counts the visible ones."""
    model = Transformer(CONFIG)
    layout = model.layout
    ids = layout.pack(torch.randint(11, (3, 6)), torch.randint(13, (3, 16)))
    with FlopCounterMode(display=False) as counter:
        sum(cross_entropies(model, ids)).backward()
    counts = training_flops(CONFIG)
    every_pair = 12 * CONFIG.width * layout.length**2 * CONFIG.depth
    assert counter.get_total_flops() == 3 * (counts["matrices"] + counts["logits"] + every_pair)
    assert counts["attention"] < every_pair


def test_the_paper_takes_six_operations_a_parameter_and_token():
    config = TransformerConfig()
    assert training_flops(config)["matrices"] == 6 * 12 * 3968**2 * 64 * 1280


def test_the_report_compares_backends(tmp_path):
    path = tmp_path / "report.json"
    run = TrainBenchmark(
        model=CONFIG, backends=("dense", "blocks"), rounds=2, precision="fp32", device="cpu", json=path
    )
    benchmark_training(run)
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["parameters"] == sum(p.numel() for p in Transformer(CONFIG).parameters())
    assert report["backends"]["dense"]["times_as_fast_as_dense"] == 1
    assert report["backends"]["blocks"]["seconds"] > 0
    assert report["hardware"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"size": "13b"}, "unknown size '13b'; expected one of tiny"),
        ({"rounds": 0}, "must be positive"),
        ({"backends": ()}, "name at least one"),
    ],
)
def test_bad_settings_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        TrainBenchmark(**words)


# Data.

SMALL_DVAE = DVAEConfig(widths=(4, 8), blocks_per_group=1, downsampling=2, vocab_size=8, code_width=4)
DATA = DataBenchmark(
    workers=(0, 1), resolutions=(16, 32), dvae=SMALL_DVAE, model=replace(CONFIG, text_vocab=400, text_len=20),
    batch_size=2, batches=2, rounds=2, precision="fp32", device="cpu",
)  # fmt: skip


def test_the_report_has_every_case_with_its_ratios_and_its_wait(tmp_path):
    path = tmp_path / "report.json"
    benchmark_data(replace(DATA, json=path))
    report = json.loads(path.read_text(encoding="utf-8"))
    names = [f"shapes, {r} x {r}, {workers} workers" for r in (16, 32) for workers in (0, 1)]
    assert list(report["cases"]) == [*names, "token cache"]
    assert report["cases"][names[0]]["times_as_fast_as_the_first"] == 1
    for name, numbers in report["cases"].items():
        assert ("tokens_per_second" if name == "token cache" else "pictures_per_second") in numbers
        assert min(numbers.values()) > 0
        assert 0 < numbers["share_waited"] < 1


def test_ratios_are_taken_within_a_round():
    """A machine that is ten times slower in one round changes no ratio."""
    case = Case("b", "pictures", 6, None, None)
    times = {"a": {"batch": 4.0, "wait": 1.0, "step": 1.0}, "b": {"batch": 2.0, "wait": 1.0, "step": 3.0}}
    slow = {name: {key: 10 * value for key, value in numbers.items()} for name, numbers in times.items()}
    numbers = line(case, [times, slow, times], "a")
    assert numbers["pictures_per_second"] == 3
    assert numbers["times_as_fast_as_the_first"] == 2
    assert numbers["times_as_fast_as_its_step"] == 1.5
    assert numbers["share_waited"] == 0.25


def test_a_given_cache_and_tokenizer_are_read(chain, tiny_runs):
    run = replace(DATA, tokens=chain / "tokens", tokenizer=chain / "text", workers=(0,), resolutions=(16,), rounds=1)
    report = benchmark_data(replace(run, model=tiny_runs.transformer.model))
    assert report["cases"]["token cache"]["tokens_per_second"] > 0


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

"""Benchmark of sampling: seconds and ratios of its report."""

import json

import pytest
import torch

from dalle.benchmarks.config import SampleBenchmark
from dalle.benchmarks.dalle_pytorch import DallePytorchSampler
from dalle.benchmarks.sample import benchmark_sample
from dalle.transformer import TransformerConfig

CONFIG = TransformerConfig(2, 2, 8, 6, (4, 4), 11, 13, conv_kernel=3)
QUICK = {"model": CONFIG, "precision": "fp32", "device": "cpu"}


def test_the_report_has_seconds_and_tokens_of_each_batch(tmp_path):
    path = tmp_path / "report.json"
    report = benchmark_sample(SampleBenchmark(**QUICK, batch=(1, 3), rounds=2, json=path))
    assert json.loads(path.read_text(encoding="utf-8")) == report
    assert list(report["results"]) == ["batch 1", "batch 3"]
    for line in report["results"].values():
        image = (line["time_to_first_token"] + 15 * line["seconds_per_step"]) / line["batch"]
        assert line["seconds_per_image"] == pytest.approx(image)
        assert line["tokens_per_sec"] == pytest.approx(line["batch"] / line["seconds_per_step"])
        assert line["overhead_vs_matmul"] > 0
    assert (report["tokens_sampled"], report["image_tokens"], report["precision"]) == (16, 16, "fp32")


def test_compiling_is_timed_apart(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    report = benchmark_sample(SampleBenchmark(**QUICK, batch=(2,), tokens=4, int8=True, compile=True))
    assert report["int8"]
    assert report["compile"]
    assert report["results"]["batch 2"]["compile_seconds"] > 0


@pytest.mark.usefixtures("_dalle_pytorch")
def test_the_other_package_samples_token_by_token_with_one_cache():
    theirs = DallePytorchSampler(CONFIG, torch.device("cpu"))
    tokens = theirs(5)
    assert tokens.shape == (1, 5)
    assert 0 <= tokens.min() <= tokens.max() < 13
    texts, images, caches = zip(*theirs.model.calls, strict=True)
    assert set(texts) == {(1, 6)}
    assert [shape[1] for shape in images] == [0, 1, 2, 3, 4]
    assert all(cache is caches[0] for cache in caches)


@pytest.mark.usefixtures("_dalle_pytorch")
def test_a_part_of_an_image_counts_by_proportion():
    report = benchmark_sample(SampleBenchmark(**QUICK, batch=(1,), tokens=4, baseline="dalle-pytorch"))
    assert report["tokens_sampled"] == 4
    ours, theirs = report["results"]["batch 1"], report["results"]["dalle-pytorch"]
    ratio = theirs["seconds_per_image"] / ours["seconds_per_image"]
    assert ours["speedup_vs_dalle-pytorch"] == pytest.approx(ratio)

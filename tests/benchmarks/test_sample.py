"""The benchmark of sampling runs and reports (dalle/benchmarks/sample.py)."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from dalle.benchmarks.dalle_pytorch import DallePytorchDraw
from dalle.benchmarks.sample import SampleBenchmark, benchmark_sampling
from dalle.transformer import TransformerConfig
from dalle.transformer.sizes import cache_bytes, read_bytes

CONFIG = TransformerConfig(2, 2, 8, 6, (4, 4), 11, 13, conv_kernel=3)
QUICK = {"model": CONFIG, "precision": "fp32", "device": "cpu"}


def test_the_report_tells_seconds_tokens_and_bytes_of_each_batch(tmp_path):
    path = tmp_path / "report.json"
    benchmark_sampling(SampleBenchmark(**QUICK, batch=(1, 3), rounds=2, json=path))
    report = json.loads(path.read_text(encoding="utf-8"))
    assert [line["batch"] for line in report["batches"]] == [1, 3]
    assert report["seconds_per_image"] == min(line["seconds_per_image"] for line in report["batches"])
    for line in report["batches"]:
        image = (line["seconds_to_the_first_token"] + 15 * line["seconds_per_step"]) / line["batch"]
        assert line["seconds_per_image"] == pytest.approx(image)
        assert line["tokens_per_sec"] == pytest.approx(line["batch"] / line["seconds_per_step"])
        assert line["bytes_per_step"] == read_bytes(CONFIG, line["batch"], 4)
        assert (line["cache_bytes_per_caption"], line["cache_bytes_per_candidate"]) == cache_bytes(CONFIG, 4)
        rate = line["bytes_per_step"] / line["seconds_per_step"]
        assert line["share_of_copy_rate"] == pytest.approx(rate / report["copy_bytes_per_second"])
        assert line["times_of_matrix_products_alone"] > 0
    assert (report["tokens_drawn"], report["image_tokens"], report["precision"]) == (16, 16, "fp32")


def test_matrices_in_8_bits_are_counted_so(tmp_path):
    report = benchmark_sampling(SampleBenchmark(**QUICK, batch=(2,), int8=True))
    assert report["int8"]
    assert report["batches"][0]["bytes_per_step"] == read_bytes(CONFIG, 2, 4, int8=True)


def test_a_step_is_compiled_before_it_is_timed(monkeypatch):
    slots = []

    def compiled(model):
        return lambda tokens, slot, caches: slots.append(slot) or model.decode_step(tokens, slot, caches)

    monkeypatch.setattr("dalle.transformer.generate.compiled_step", compiled)
    report = benchmark_sampling(SampleBenchmark(**QUICK, batch=(1,), tokens=4, compile=True))
    assert report["compile"]
    assert report["batches"][0]["seconds_of_compiling"] > 0
    assert all(isinstance(slot, torch.Tensor) for slot in slots)
    assert [int(slot) for slot in slots] == [1, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": "huge"}, "unknown size 'huge'"),
        ({"batch": (0,)}, "batch and rounds must be positive"),
        ({"batch": ()}, "batch name at least one"),
        ({"tokens": 1}, "tokens must be 2 to 16, got 1"),
        ({"tokens": 17}, "tokens must be 2 to 16, got 17"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        SampleBenchmark(**QUICK | settings)


def test_a_graph_is_for_cuda():
    with pytest.raises(ValueError, match="graph is for cuda, the device is cpu"):
        benchmark_sampling(SampleBenchmark(**QUICK, graph=True))


class Recorder(nn.Module):
    """A package of that name that records what it is asked for."""

    def __init__(self, **words):
        super().__init__()
        self.words, self.calls = words, []

    def forward(self, text, image, cache):
        self.calls.append((tuple(text.shape), tuple(image.shape), cache))
        return torch.zeros(1, 1, 11 + 6 + 13)


@pytest.fixture
def _their_package(monkeypatch):
    package = ModuleType("dalle_pytorch")
    package.DALLE, package.DiscreteVAE = Recorder, lambda **words: SimpleNamespace(**words)
    monkeypatch.setitem(sys.modules, "dalle_pytorch", package)


@pytest.mark.usefixtures("_their_package")
def test_the_other_package_draws_token_by_token_with_one_cache():
    theirs = DallePytorchDraw(CONFIG, ("full",), torch.device("cpu"))
    tokens = theirs(5)
    assert tokens.shape == (1, 5)
    assert 0 <= tokens.min() <= tokens.max() < 13
    texts, images, caches = zip(*theirs.model.calls, strict=True)
    assert set(texts) == {(1, 6)}
    assert [shape[1] for shape in images] == [0, 1, 2, 3, 4]
    assert all(cache is caches[0] for cache in caches)


@pytest.mark.usefixtures("_their_package")
def test_a_part_of_a_image_counts_by_proportion():
    report = benchmark_sampling(SampleBenchmark(**QUICK, batch=(1,), tokens=4, against="dalle-pytorch"))
    assert report["tokens_drawn"] == 4
    theirs, ours = (report["dalle-pytorch"]["seconds_per_image"], report["seconds_per_image"])
    assert report["times_as_fast_as_dalle-pytorch"]["1"] == pytest.approx(theirs / ours)

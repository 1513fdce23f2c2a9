"""The curves of compression: two replicas train in every way, and the report has a line and a curve of each."""

import json
from dataclasses import replace

import pytest
import torch

from dalle.benchmarks.studies.powersgd import WAYS, ColorTokens, CompressionBenchmark, benchmark_compression
from dalle.transformer import TransformerConfig

SMALL = replace(CompressionBenchmark().model, depth=2, heads=2, head_dim=8)


def test_every_way_has_a_curve_and_sends_what_it_should(tmp_path):
    run = CompressionBenchmark(
        model=SMALL,
        steps=2,
        batch_size=2,
        rank=2,
        image=tmp_path / "a" / "curves.png",
        json=tmp_path / "b.json",
    )
    report = benchmark_compression(run)
    assert report["ways"].keys() == WAYS.keys()
    sent = {way: line["comm_mb"] for way, line in report["ways"].items()}
    whole, factored, short = (sent[way] for way in [*list(WAYS)[:2], list(WAYS)[4]])
    assert short < factored < whole == sent["moments fp16"]
    assert all(len(curve["loss"]) == 2 for curve in report["curves"].values())
    assert all(line["loss"] > 0 for line in report["ways"].values())
    first = {way: curve["loss"][0] for way, curve in report["curves"].items()}
    assert len(set(first.values())) == 1  # same weights, same images
    assert (tmp_path / "a" / "curves.png").stat().st_size > 0
    assert json.loads((tmp_path / "b.json").read_text())["ways"] == report["ways"]


def test_images_as_tokens_are_the_rounded_colors_of_their_pixels():
    data = ColorTokens(SMALL.layout, seed=0)
    text, image = SMALL.layout.unpack(data(range(3)))
    assert image.shape == (3, 144)
    assert image.max() < 64
    assert 2 <= len(image[0].unique()) < 64  # a ground and what stands on it
    assert torch.equal(data(range(1, 2)), data(range(3))[1:2])
    assert (text[:, 0] > 0).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"rank": 0}, "positive"), ({"batch_size": 3}, "multiple"), ({"model": TransformerConfig()}, "grid")],
)
def test_a_run_that_cannot_be_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        CompressionBenchmark(**wrong)

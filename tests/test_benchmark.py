"""The benchmark runs and reports, and its operations are counted right."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle.stages.benchmark import TrainBenchmark, benchmark_training
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

"""Memory and traffic of one GPU, by hand."""

from dataclasses import replace

import pytest

from dalle.planner.memory import ParallelLayout, StepEstimate, memory, traffic
from dalle.train.config import EMAConfig, OptimizerConfig, PowerSGDConfig, TrainConfig

SIZES = {"largest_group": 100, "ungrouped": 200, "activations": 5000, "copies": 1600, "working": 700}
SIZES["largest_tensor"] = 50
STEP = StepEstimate(1000, flops={}, peak=8000, **SIZES)


PLAIN = TrainConfig(optimizer=OptimizerConfig(max_variance=None))
EIGHT_BIT = replace(PLAIN, optimizer=replace(PLAIN.optimizer, state_dtype="8bit"))
FACTORED = replace(PLAIN, powersgd=PowerSGDConfig(rank=4))


def test_memory():
    alone = memory(STEP, ParallelLayout(PLAIN, "none"))
    assert alone["peak"] == 3 * 4000 + 4000 + 8000  # weights, moments, ema, and the step's own peak
    clipping = ParallelLayout(TrainConfig(), "none")
    assert memory(STEP, clipping)["peak"] == alone["peak"]
    assert memory(replace(STEP, peak=0), clipping)["peak"] == 6 * 4000
    accumulating = memory(STEP, ParallelLayout(replace(PLAIN, grad_accum_steps=2), "none"))
    assert accumulating["peak"] == 5 * 4000 + 1600 + 5000 + 700
    assert memory(STEP, ParallelLayout(PLAIN, "ddp", 2))["peak"] == accumulating["peak"]  # whole buckets
    assert memory(STEP, ParallelLayout(EIGHT_BIT, "none"))["moments"] == 2000
    assert memory(STEP, ParallelLayout(replace(PLAIN, ema=EMAConfig(device="cpu")), "none"))["ema"] == 0
    assert memory(STEP, ParallelLayout(FACTORED, "ddp", 2))["error_buffers"] == 4 * 800
    sharded = memory(STEP, ParallelLayout(PLAIN, "fsdp", 4, 4))
    assert (alone["start"], sharded["start"]) == (4000, 1000 + 4 * 50)
    assert sharded["weights"] == sharded["gradients"] == sharded["ema"] == 1000
    assert sharded["gathered"] == (2 * 2 * 100 + 4 * 200) + (2 * 100 + 4 * 100 + 4 * 200)


GATHERED = 2 * 800 + 4 * 200 + 2 * 800 + 4 * 1000
"""Forward, backward and gradients of fsdp."""


@pytest.mark.parametrize(
    ("mode", "gpus", "shards", "kept", "inside", "between"),
    [
        ("none", 1, 1, 1, 0, 0),
        ("ddp", 2, 1, 1, 2 * 4000 / 2, 0),
        ("ddp", 4, 1, 1, 0, 2 * 4000 * 3 / 4),
        ("fsdp", 4, 4, 1, 0, GATHERED * 3 / 4),
        ("hsdp", 4, 2, 1, GATHERED / 2, 2 * (4000 / 2) / 2),
        ("hsdp", 4, 2, 0.25, GATHERED / 2, 2 * (4 * (200 + 200) / 2) / 2),
    ],
)
def test_bytes_sent(mode, gpus, shards, kept, inside, between):
    """1,000 parameters, 200 of them outside of the layers, nodes of 2 GPUs."""
    layout = ParallelLayout(PLAIN, mode, gpus, shards)
    assert traffic(STEP, layout, 2, kept) == {"inside": inside, "between": between}
    if mode == "fsdp":
        layout = replace(layout, train=replace(PLAIN, grad_accum_steps=3))
        assert traffic(STEP, layout, 2) == {"inside": 0, "between": 3 * between}

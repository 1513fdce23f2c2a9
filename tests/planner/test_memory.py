"""Memory and traffic of one GPU, by hand."""

from dataclasses import replace

import pytest

from dalle.planner.memory import ParallelLayout, StepEstimate, memory, ring, traffic

SIZES = {"largest_group": 100, "ungrouped": 200, "activations": 5000, "copies": 1600, "working": 700}
STEP = StepEstimate(1000, flops={}, peak=8000, **SIZES)


def test_memory():
    alone = memory(STEP, ParallelLayout("none"))
    assert alone["peak"] == 3 * 4000 + 4000 + 8000  # weights, moments, ema, and the step's own peak
    assert memory(STEP, ParallelLayout("none", clips_variance=True))["peak"] == alone["peak"]
    clipping = memory(replace(STEP, peak=0), ParallelLayout("none", clips_variance=True))
    assert clipping["peak"] == 6 * 4000
    accumulating = memory(STEP, ParallelLayout("none", grad_accum_steps=2))
    assert accumulating["peak"] == 5 * 4000 + 1600 + 5000 + 700
    assert memory(STEP, ParallelLayout("ddp"))["peak"] == alone["peak"] + 4000  # buckets
    assert memory(STEP, ParallelLayout("none", state_dtype="8bit"))["moments"] == 2000
    assert memory(STEP, ParallelLayout("none", ema_on_gpu=False))["ema"] == 0
    assert memory(STEP, ParallelLayout("ddp", error_buffers=True))["error_buffers"] == 4 * 800


def test_memory_of_shards():
    sharded = memory(STEP, ParallelLayout("fsdp", shards=4))
    assert sharded["weights"] == sharded["gradients"] == sharded["ema"] == 1000
    assert sharded["gathered"] == (2 * 2 * 100 + 4 * 200) + (2 * 100 + 4 * 100 + 4 * 200)


GATHERED = 2 * 800 + 4 * 200 + 2 * 800 + 4 * 1000
"""Forward, backward and gradients of fsdp."""


@pytest.mark.parametrize(
    ("layout", "gpus", "kept", "inside", "between"),
    [
        (ParallelLayout("none"), 1, 1, 0, 0),
        (ParallelLayout("ddp"), 2, 1, 2 * 4000 / 2, 0),
        (ParallelLayout("ddp"), 4, 1, 0, 2 * 4000 * 3 / 4),
        (ParallelLayout("fsdp", 4), 4, 1, 0, GATHERED * 3 / 4),
        (ParallelLayout("fsdp", 4, grad_accum_steps=3), 4, 1, 0, 3 * GATHERED * 3 / 4),
        (ParallelLayout("hsdp", 2), 4, 1, GATHERED / 2, 2 * (4000 / 2) / 2),
        (ParallelLayout("hsdp", 2), 4, 0.25, GATHERED / 2, 2 * (4 * (200 + 200) / 2) / 2),
    ],
)
def test_bytes_sent(layout, gpus, kept, inside, between):
    """1,000 parameters, 200 of them outside of the layers, nodes of 2 GPUs."""
    assert ring(800, 4) == 600
    assert traffic(STEP, layout, gpus, 2, kept) == {"inside": inside, "between": between}

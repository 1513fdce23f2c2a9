"""Bytes on one GPU, by part, for each way of sharing a training among GPUs (dalle/train/distributed.py).

    S processes that share one set of parameters: 1 for none and ddp, all for fsdp, those of a machine for hsdp

Whatever S is, each GPU has its own activations. Slices of a layer are gathered in 16 bit as it is needed, the next
one ahead of time; what lies outside of the layers is gathered once a step in fp32.
"""

from dataclasses import dataclass
from typing import Literal

from dalle.planner.count import StepEstimate

FP32, HALF = 4, 2
BOUNDED_AT_ONCE = FP32 * 2**26
"""Bytes of the variance that are clipped at once, at most."""
Moments = Literal["fp32", "8bit"]


@dataclass(frozen=True)
class ParallelLayout:
    """How a training is shared, as far as memory is concerned."""

    mode: str
    """none, ddp, fsdp or hsdp."""
    shards: int = 1
    """S."""
    half: bool = True
    """Whether it computes in bf16 or fp16."""
    accumulate: int = 1
    """Passes whose gradients add up."""
    moments: Moments = "fp32"
    """How AdamW keeps its moments."""
    ema_on_gpu: bool = True
    """Whether the averaged weights lie on the GPU."""
    bounds_variance: bool = False
    """Whether the running variance is clipped before each update, a part of it at a time."""
    error_buffers: bool = False
    """Whether PowerSGD keeps what it has not sent."""


def memory(step: StepEstimate, how: ParallelLayout) -> dict[str, float]:
    """Bytes by part, and at the peak, where not all parts need be there at once.

    A single pass begins without gradients, and they grow while activations go. With several passes, or where layers
    are gathered, the peak is counted as the sum of the parts, which it cannot exceed.

    Returns:
        weights, gradients, moments, average, error_buffers, gathered (layers and their gradients whole, and the
        buckets of ddp), copies (16-bit weights that autocast makes), activations, working (logits, the block at
        work), peak.
    """
    slice_of_all = FP32 * step.parameters / how.shards
    sharded = how.mode in ("fsdp", "hsdp")
    parts = {
        "weights": slice_of_all,
        "gradients": slice_of_all,
        "moments": 2 * slice_of_all if how.moments == "fp32" else 2 * slice_of_all / FP32,
        "average": slice_of_all if how.ema_on_gpu else 0.0,
        "error_buffers": FP32 * (step.parameters - step.outside) / how.shards if how.error_buffers else 0.0,
        "gathered": _gathered(step, how),
        "copies": 0.0 if sharded else step.copies,
        "activations": step.kept,
        "working": step.working,
    }
    peak = sum(parts.values())
    if not sharded and how.accumulate == 1:
        states = peak - sum(parts[name] for name in ("gradients", "copies", "activations", "working"))
        bounding = min(slice_of_all, BOUNDED_AT_ONCE) if how.bounds_variance else 0.0
        peak = states + max(parts["gradients"] + bounding, step.together)
    return parts | {"peak": peak}


def _gathered(step: StepEstimate, how: ParallelLayout) -> float:
    if how.mode == "ddp":
        return FP32 * step.parameters  # its buckets hold the gradients once more
    if how.mode == "none" or how.shards == 1:
        return 0.0
    weights = 2 * (HALF if how.half else FP32) * step.largest + FP32 * step.outside
    gradients = (HALF if how.half else 0) * step.largest + FP32 * step.largest + FP32 * step.outside
    return weights + gradients


def starts_whole(step: StepEstimate) -> float:
    """Bytes that each process needs before it slices: it makes the whole model first."""
    return FP32 * step.parameters

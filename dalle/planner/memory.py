"""Memory and traffic of one GPU in a training step, for each way of sharing the training
(dalle/train/distributed.py).

Activations are each GPU's own. Sharded layers are gathered in 16 bit as they are needed, the next one ahead
of time; parameters outside of the layers once a step in fp32.
"""

from dataclasses import dataclass

FP32, HALF = 4, 2
VARIANCE_CHUNK = FP32 * 2**26
"""Bytes of the second moment that are clipped at once, at most."""


@dataclass(frozen=True)
class StepEstimate:
    """One forward and backward pass over a batch: parameters, FLOPs and bytes."""

    parameters: int
    """Parameters of the model."""
    largest_group: int
    """Parameters of the largest group that FSDP gathers at once: a layer."""
    ungrouped: int
    """Parameters outside of these groups."""
    flops: dict[str, int]
    """FLOPs of attention and of all other products, including those recomputed."""
    activations: int
    """Bytes held for the backward pass, without parameters and their 16-bit copies."""
    copies: int
    """Bytes of autocast's 16-bit copies of parameters at the end of the forward pass."""
    working: int
    """Bytes at the peak besides parameters, copies, complete gradients and activations: logits, one layer."""
    peak: int
    """Bytes of activations, copies, working memory and gradients at their common peak."""


@dataclass(frozen=True)
class ParallelLayout:
    """How a training is shared, as far as memory is concerned."""

    mode: str
    """none, ddp, fsdp or hsdp."""
    shards: int = 1
    """Processes that share one set of parameters: 1 for none and ddp, all for fsdp, those of a node for
    hsdp."""
    half: bool = True
    """Whether it computes in bf16 or fp16."""
    grad_accum_steps: int = 1
    """Passes whose gradients add up."""
    state_dtype: str = "fp32"
    """How AdamW stores its moments: fp32, paper or 8bit."""
    ema_on_gpu: bool = True
    """Whether the averaged weights lie on the GPU."""
    clips_variance: bool = False
    """Whether the second moment is clipped before each update."""
    error_buffers: bool = False
    """Whether PowerSGD keeps error buffers."""


def memory(step: StepEstimate, how: ParallelLayout) -> dict[str, float]:
    """Bytes by part, and at the peak, where not all parts need be there at once.

    In a single pass without sharding gradients grow while activations shrink; in all other cases the peak is
    the sum of the parts, which it cannot exceed.

    Returns:
        weights, gradients, moments, ema, error_buffers, gathered (whole layers and their gradients; ddp's
        buckets), copies (autocast's 16-bit weights), activations, working (logits, one layer), peak.
    """
    shard = FP32 * step.parameters / how.shards
    sharded = how.mode in ("fsdp", "hsdp")
    parts = {
        "weights": shard,
        "gradients": shard,
        "moments": 2 * (shard / FP32 if how.state_dtype == "8bit" else shard),
        "ema": shard if how.ema_on_gpu else 0.0,
        "error_buffers": FP32 * (step.parameters - step.ungrouped) / how.shards if how.error_buffers else 0.0,
        "gathered": _gathered(step, how),
        "copies": 0.0 if sharded else step.copies,
        "activations": step.activations,
        "working": step.working,
    }
    peak = sum(parts.values())
    if not sharded and how.grad_accum_steps == 1:
        of_step = sum(parts[name] for name in ("gradients", "copies", "activations", "working"))
        clipping = min(shard, VARIANCE_CHUNK) if how.clips_variance else 0.0
        peak += max(parts["gradients"] + clipping, step.peak) - of_step
    return parts | {"peak": peak}


def _gathered(step: StepEstimate, how: ParallelLayout) -> float:
    if how.mode == "ddp":
        return FP32 * step.parameters  # its buckets hold the gradients once more
    if how.mode == "none" or how.shards == 1:
        return 0.0
    weights = 2 * (HALF if how.half else FP32) * step.largest_group + FP32 * step.ungrouped
    gradients = (HALF + FP32 if how.half else FP32) * step.largest_group + FP32 * step.ungrouped
    return weights + gradients


def ring(size: float, processes: int) -> float:
    """Bytes that each process sends to gather or reduce-scatter `size` bytes by a ring, which sends least."""
    return size * (processes - 1) / processes


def traffic(
    step: StepEstimate, how: ParallelLayout, gpus: int, gpus_per_node: int, kept: float = 1.0
) -> dict[str, float]:
    """Bytes that one GPU sends in a step (2.5, Table 2): {"inside": its node, "between": to other nodes}.

    Args:
        step: of the model.
        how: fsdp and hsdp gather and scatter in each pass.
        gpus: in all.
        gpus_per_node: in a node.
        kept: fraction of the layers' gradients that replicas still send with PowerSGD.
    """
    layers = step.parameters - step.ungrouped
    sent = {"inside": 0.0, "between": 0.0}
    if how.mode in ("fsdp", "hsdp"):
        dtype = HALF if how.half else FP32
        forward = ring(dtype * layers + FP32 * step.ungrouped, how.shards)
        backward = ring(dtype * layers, how.shards) + ring(FP32 * step.parameters, how.shards)
        link = "between" if how.shards > gpus_per_node else "inside"
        sent[link] += how.grad_accum_steps * (forward + backward)
    if how.mode != "none":
        averaged = FP32 * (kept * layers + step.ungrouped) / how.shards
        sent["between" if gpus > gpus_per_node else "inside"] += 2 * ring(averaged, gpus // how.shards)
    return sent

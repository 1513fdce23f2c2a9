"""Memory and traffic of one GPU in a training step, for each way of sharing the training
(dalle/train/distributed.py).

Activations are each GPU's own. Sharded layers are gathered in 16 bit as they are needed, the next one ahead
of time; parameters outside of the layers once a step in fp32.
"""

from dataclasses import dataclass

from dalle.train.config import VARIANCE_CHUNK, TrainConfig

FP32, HALF = 4, 2


@dataclass(frozen=True)
class StepEstimate:
    """One forward and backward pass over a batch: parameters, FLOPs and bytes."""

    parameters: int
    """Parameters of the model."""
    largest_group: int
    """Parameters of the largest group that FSDP gathers at once: a layer."""
    ungrouped: int
    """Parameters outside of these groups."""
    largest_tensor: int
    """Elements of the largest parameter."""
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
    """How a training is shared."""

    train: TrainConfig
    """Passes whose gradients add up, moments, averaged weights and PowerSGD."""
    mode: str
    """none, ddp, fsdp or hsdp."""
    gpus: int = 1
    """In all."""
    shards: int = 1
    """GPUs that share one set of parameters: 1 for none and ddp, all for fsdp, those of a node for hsdp."""
    half: bool = True
    """Whether it computes in bf16 or fp16."""


def memory(step: StepEstimate, how: ParallelLayout) -> dict[str, float]:
    """Bytes by part, and at the peak, where not all parts need be there at once.

    In a single pass of one process, or with PowerSGD, gradients grow while activations shrink; ddp's buckets
    hold all of them from the start. In all other cases the peak is the sum of the parts, which it cannot
    exceed.

    Returns:
        weights, gradients, moments, ema, error_buffers, gathered (whole layers and their gradients), copies
        (autocast's 16-bit weights), activations, working (logits, one layer), peak; start (when the model is
        built: its weights, and under fsdp and hsdp the one parameter that is whole).
    """
    train, shard = how.train, FP32 * step.parameters / how.shards
    sharded = how.mode in ("fsdp", "hsdp")
    factored = train.powersgd.rank is not None and how.gpus > how.shards
    parts = {
        "weights": shard,
        "gradients": shard,
        "moments": 2 * (shard / FP32 if train.optimizer.state_dtype == "8bit" else shard),
        "ema": shard if train.ema.device == "same" else 0.0,
        "error_buffers": FP32 * (step.parameters - step.ungrouped) / how.shards if factored else 0.0,
        "gathered": _gathered(step, how),
        "copies": 0.0 if sharded else step.copies,
        "activations": step.activations,
        "working": step.working,
    }
    peak = sum(parts.values())
    if (how.mode == "none" or factored) and not sharded and train.grad_accum_steps == 1:
        of_step = sum(parts[name] for name in ("gradients", "copies", "activations", "working"))
        clipping = 0.0 if train.optimizer.max_variance is None else min(shard, FP32 * VARIANCE_CHUNK)
        peak += max(parts["gradients"] + clipping, step.peak) - of_step
    start = shard + (FP32 * step.largest_tensor if sharded else 0.0)
    return parts | {"peak": peak, "start": start}


def _gathered(step: StepEstimate, how: ParallelLayout) -> float:
    if how.mode in ("none", "ddp") or how.shards == 1:
        return 0.0
    weights = 2 * (HALF if how.half else FP32) * step.largest_group + FP32 * step.ungrouped
    gradients = (HALF + FP32 if how.half else FP32) * step.largest_group + FP32 * step.ungrouped
    return weights + gradients


def ring(size: float, processes: int) -> float:
    """Bytes that each process sends to gather or reduce-scatter `size` bytes by a ring, which sends least."""
    return size * (processes - 1) / processes


def traffic(
    step: StepEstimate, how: ParallelLayout, gpus_per_node: int, kept: float = 1.0
) -> dict[str, float]:
    """Bytes that one GPU sends in a step (2.5, Table 2): {"inside": its node, "between": to other nodes}.

    Args:
        step: of the model.
        how: fsdp and hsdp gather and scatter in each pass.
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
        sent[link] += how.train.grad_accum_steps * (forward + backward)
    averaged = FP32 * (kept * layers + step.ungrouped) / how.shards
    sent["between" if how.gpus > gpus_per_node else "inside"] += 2 * ring(averaged, how.gpus // how.shards)
    return sent

"""Bytes that one GPU sends in a step, within its node and between nodes (paper section 2.5, Table 2).

Collectives are counted as rings, which send least: each of n processes sends (n - 1) / n of B bytes to gather
or reduce-scatter them, and twice that to average them.
"""

from dalle.planner.memory import FP32, HALF, ParallelLayout, StepEstimate


def ring(size: float, processes: int) -> float:
    """Bytes that each of a ring's processes sends to gather, or to reduce-scatter, `size` bytes."""
    return size * (processes - 1) / processes


def traffic(
    step: StepEstimate, how: ParallelLayout, gpus: int, gpus_per_node: int, kept: float = 1.0
) -> dict[str, float]:
    """Bytes that one GPU sends in a step: {"inside": within its node, "between": to other nodes}.

    Args:
        step: of the model.
        how: mode, shards, precision and passes; fsdp and hsdp gather and scatter in each pass.
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

"""Bytes that one GPU sends in a step, within its machine and between machines (paper section 2.5, Table 2).

    P parameters, S processes that share them, R replicas of each slice, n GPUs in all = S R

Collectives are counted as rings, which send least: n processes gather or reduce-scatter B bytes by each sending
(n - 1) / n B, and average them by twice that.
"""

from dalle.planner.count import StepEstimate
from dalle.planner.memory import FP32, HALF


def ring(size: float, processes: int) -> float:
    """Bytes that each of a ring's processes sends to gather, or to reduce and scatter, `size` bytes."""
    return size * (processes - 1) / processes


def traffic(
    mode: str,
    step: StepEstimate,
    gpus: int,
    per_machine: int,
    shards: int,
    half: bool,
    share: float = 1.0,
    accumulate: int = 1,
) -> dict[str, float]:
    """Bytes that one GPU sends in an update: {"inside": to its machine, "between": to other machines}.

    Args:
        mode: none, ddp, fsdp or hsdp.
        step: of the model.
        gpus: in all.
        per_machine: of which so many in a machine.
        shards: processes that share one set of parameters.
        half: whether layers are gathered in 16 bit.
        share: of the gradients of the layers that replicas send, as PowerSGD leaves it.
        accumulate: passes in an update: fsdp and hsdp gather and scatter in each.
    """
    replicas = gpus // shards
    layers = step.parameters - step.outside
    gather = ring((HALF if half else FP32) * layers + FP32 * step.outside, shards)
    again = ring(
        (HALF if half else FP32) * layers, shards
    )  # for the backward pass; what lies outside is still there
    scatter = ring(FP32 * step.parameters, shards)
    slicing = accumulate * (gather + again + scatter) if mode in ("fsdp", "hsdp") else 0.0
    averaging = 2 * ring(FP32 * (share * layers + step.outside) / shards, replicas) if mode != "none" else 0.0
    crossing = {"inside": 0.0, "between": 0.0}
    crossing["between" if shards > per_machine else "inside"] += slicing
    crossing["between" if gpus > per_machine else "inside"] += averaging
    return crossing

"""Estimate memory, FLOPs, communication, time and cost of a training run before launching it.

python scripts/plan.py --config configs/transformer/paper.yaml --num-gpus 1024 --gpu v100-16gb --train.precision fp16
python scripts/plan.py --config configs/dvae/small.yaml --num-gpus 1 --gpu rtx-4090 --mfu 0.3 --json plan.json
"""

import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dalle.commands.train_clip import TrainCLIPArgs
from dalle.commands.train_dvae import TrainDVAEArgs
from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.config import cli_errors, overview, parse
from dalle.io.files import make_directory, write_json
from dalle.planner.count import StepEstimate, estimate_step
from dalle.planner.gpus import GPU, GPUS
from dalle.planner.memory import FP32, HALF, ParallelLayout, memory, starts_whole
from dalle.planner.table import print_plan
from dalle.planner.traffic import traffic
from dalle.runs.kinds import EACH_KIND, take_kind
from dalle.train.config import POWERSGD_RANKS, compression_rate
from dalle.transformer.sizes import cache_bytes, training_flops

HEADROOM = 0.9
"""Share of a GPU's memory that a step may fill: the rest goes to CUDA itself, to NCCL and to gaps between blocks."""


@dataclass(frozen=True)
class PlanOptions:
    """Estimates what a training run needs."""

    num_gpus: int = 8
    """GPUs in all."""
    gpu: str = "h100"
    """Their model: v100-16gb, v100-32gb, a100-40gb, a100-80gb, h100, h200, b200, t4, l4 or rtx-4090."""
    max_memory_gib: float | None = None
    """Memory of one GPU, for a model that is not listed."""
    peak_flops: float | None = None
    """FLOP/s of one GPU in the precision of the training, for a model that is not listed."""
    intra_node_gbps: float | None = None
    """GB/s that a GPU sends within its node, for a model that is not listed."""
    inter_node_gbps: float | None = None
    """GB/s that a GPU sends to other nodes, for a model that is not listed."""
    gpus_per_node: int | None = None
    """GPUs of a node; the manufacturer's by default."""
    mfu: float = 0.4
    """Fraction of the peak that the training reaches."""
    usd_per_gpu_hour: float | None = None
    """Price of a GPU for an hour."""
    powersgd_rank: int | None = None
    """Rank of PowerSGD over all shards; that of the configuration, or of Table 1, by default."""
    json: Path | None = None
    """File for the plan, which is also printed."""

    def __post_init__(self):
        super().__post_init__()  # that of the training's arguments
        if self.gpu not in GPUS:
            raise ValueError(f"unknown gpu {self.gpu!r}; expected one of {', '.join(GPUS)}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must lie in (0, 1], got {self.mfu}")
        for name in (field.name for field in fields(PlanOptions)):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{name.replace('_', '-')} must be positive, got {value}")

    def hardware(self) -> GPU:
        """The GPU with the numbers that the options override."""
        known, given = GPUS[self.gpu], {}
        given |= {"memory": self.max_memory_gib} if self.max_memory_gib else {}
        given |= {"fp32": self.peak_flops, "half": self.peak_flops} if self.peak_flops else {}
        given |= {"inside": self.intra_node_gbps * 1e9} if self.intra_node_gbps else {}
        given |= {"between": self.inter_node_gbps * 1e9} if self.inter_node_gbps else {}
        return replace(known, **given, **({"per_machine": self.gpus_per_node} if self.gpus_per_node else {}))


@dataclass(frozen=True)
class DVAEPlan(PlanOptions, TrainDVAEArgs):
    """Estimates what training the dVAE of a configuration needs."""


@dataclass(frozen=True)
class TransformerPlan(PlanOptions, TrainTransformerArgs):
    """Estimates what training the transformer of a configuration needs."""


@dataclass(frozen=True)
class CLIPPlan(PlanOptions, TrainCLIPArgs):
    """Estimates what training the CLIP of a configuration needs."""


PLANS: dict[str, type] = {"dvae": DVAEPlan, "transformer": TransformerPlan, "clip": CLIPPlan}


def plan_training(kind: str, run: Any) -> dict[str, Any]:
    """Estimates the training, prints a table and writes --json.

    Raises:
        ValueError: the batch does not divide among the GPUs.
    """
    if run.json:
        make_directory(run.json.parent)
    gpu = run.hardware()
    precision = _precision(run.train.precision, gpu)
    batch = _batch_of_pass(run)
    steps = dry_steps(kind, run, batch, precision)
    own = steps[
        "activation_checkpointing" if getattr(run.model, "activation_checkpointing", False) else "keep"
    ]
    report = {
        "kind": kind,
        "parameters": own.parameters,
        "num_gpus": run.num_gpus,
        "gpu": run.gpu,
        "hardware": asdict(gpu),
        "precision": precision,
        "batch": {"update": run.train.batch_size, "pass": batch, "accumulate": _accumulate(run)},
        "flops": _flops(kind, run, own, batch),
        "memory": {mode: _memory(run, mode, steps, precision) for mode in modes(run)},
        "starts_whole": starts_whole(own),
        "traffic": {mode: _traffic(kind, run, mode, own, gpu, precision) for mode in modes(run)},
    }
    if kind == "transformer":
        report["cache_per_candidate"] = {
            name: cache_bytes(run.model, FP32 if name == "fp32" else HALF)[1] for name in ("fp32", precision)
        }
    report["time"] = _time(run, report["flops"]["needed"], gpu, precision)
    if run.json:
        write_json(run.json, report)
    print_plan(report, HEADROOM)
    return report


def modes(run: Any) -> list[str]:
    """One GPU trains alone; more may share in three ways, hsdp only where there is more than one machine."""
    if run.num_gpus == 1:
        return ["none"]
    return ["ddp", "fsdp"] + (["hsdp"] if _shards(run, "hsdp") < run.num_gpus else [])


def dry_steps(kind: str, run: Any, batch: int, precision: str) -> dict[str, StepEstimate]:
    """A step that keeps what is inside of each resblock, and for the transformer one that computes it again."""
    if kind != "transformer":
        pixels = None
        if kind == "dvae":
            side = run.crop or run.data.resolution
            pixels = (side, side)
        return {"keep": estimate_step(kind, run.model, batch, precision, pixels)}
    variants = {"keep": False, "activation_checkpointing": True}
    return {
        name: estimate_step(kind, replace(run.model, activation_checkpointing=on), batch, precision)
        for name, on in variants.items()
    }


def _precision(asked: str, gpu: GPU) -> str:
    return asked if asked != "auto" else "bf16" if gpu.bf16 else "fp32"


def _accumulate(run: Any) -> int:
    return getattr(run.train, "accumulate", 1)


def _batch_of_pass(run: Any) -> int:
    parts = run.num_gpus * _accumulate(run)
    if run.train.batch_size % parts:
        raise ValueError(
            f"train.batch_size {run.train.batch_size} does not divide among {run.num_gpus} GPUs and {_accumulate(run)} "
            f"passes (train.accumulate); make it a multiple of {parts}"
        )
    return run.train.batch_size // parts


def _shards(run: Any, mode: str) -> int:
    if mode == "hsdp":
        return getattr(run, "shard", None) or min(run.hardware().per_machine, run.num_gpus)
    return run.num_gpus if mode == "fsdp" else 1


def _rank(kind: str, run: Any) -> int | None:
    """PowerSGD's rank, where it applies."""
    if kind != "transformer":
        return None
    configured = getattr(getattr(run.train, "powersgd", None), "rank", None)
    return run.powersgd_rank or configured or POWERSGD_RANKS.get(run.model.width)


def _memory(
    run: Any, mode: str, steps: dict[str, StepEstimate], precision: str
) -> dict[str, dict[str, float]]:
    optimizer, powersgd = run.train.optimizer, getattr(run.train, "powersgd", None)
    replicas = run.num_gpus // _shards(run, mode)
    how = ParallelLayout(
        mode=mode,
        shards=_shards(run, mode),
        half=precision != "fp32",
        accumulate=_accumulate(run),
        moments=getattr(optimizer, "state_dtype", "fp32"),
        ema_on_gpu=getattr(run.train.ema, "device", "same") == "same",
        bounds_variance=getattr(optimizer, "max_variance", None) is not None,
        error_buffers=replicas > 1 and getattr(powersgd, "rank", None) is not None,
    )
    return {name: memory(step, how) for name, step in steps.items()}


def _traffic(
    kind: str, run: Any, mode: str, step: StepEstimate, gpu: GPU, precision: str
) -> dict[str, dict[str, float]]:
    shards, half = _shards(run, mode), precision != "fp32"
    place = (mode, step, run.num_gpus, gpu.per_machine, shards, half)
    found = {"whole": traffic(*place, accumulate=_accumulate(run))}
    rank = _rank(kind, run)
    if (
        rank
        and mode in ("ddp", "hsdp")
        and (share := 1 - compression_rate(run.model.width, rank, shards)) < 1
    ):
        found["powersgd"] = traffic(*place, share=share, accumulate=_accumulate(run)) | {"rank": rank}
    for sent in found.values():
        sent["seconds"] = sent["inside"] / gpu.inside + sent["between"] / gpu.between
    return found


def _flops(kind: str, run: Any, step: StepEstimate, batch: int) -> dict[str, Any]:
    """Of an update: what is computed, by part, and what the model needs; and 6 N for each token, the usual estimate."""
    passes = run.train.batch_size // batch
    computed = {part: passes * count for part, count in step.flops.items()}
    needed = dict(computed)
    if kind == "transformer":
        of_stream = training_flops(run.model)
        needed = {name: run.train.batch_size * count for name, count in of_stream.items()}
    result: dict[str, Any] = {"computed": computed, "needed": sum(needed.values()), "needed_by_part": needed}
    if kind == "transformer":
        tokens = run.train.batch_size * run.model.layout.seq_len
        result |= {"tokens": tokens, "six_n_of_run": 6 * step.parameters * tokens * run.steps}
    return result


def _time(run: Any, needed: int, gpu: GPU, precision: str) -> dict[str, float]:
    peak = gpu.fp32 if precision == "fp32" else gpu.half
    seconds = needed / (run.mfu * peak * run.num_gpus)
    hours = seconds * run.steps * run.num_gpus / 3600
    found = {"mfu": run.mfu, "step_seconds": seconds, "steps": run.steps, "days": seconds * run.steps / 86400}
    found |= {"flops_of_run": needed * run.steps, "gpu_hours": hours}
    return found | ({"usd": run.usd_per_gpu_hour * hours} if run.usd_per_gpu_hour else {})


def main() -> None:
    """Command line of plan."""
    with cli_errors():
        overview(sys.argv[1:], __doc__, EACH_KIND)
        kind, words = take_kind(sys.argv[1:])
        plan_training(kind, parse(PLANS[kind], words, description=__doc__))

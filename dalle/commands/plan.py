"""Estimate memory, FLOPs, communication, time and cost of a training run before launching it.

python scripts/plan.py --config configs/transformer/paper.yaml --num-gpus 64 --gpu h100
python scripts/plan.py --config configs/dvae/small.yaml --num-gpus 1 --gpu rtx-4090 --mfu 0.3 --json plan.json
"""

import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

from dalle.commands.train_clip import TrainCLIPArgs
from dalle.commands.train_dvae import TrainDVAEArgs
from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.config import cli_errors, configuration, parse
from dalle.help import overview
from dalle.planner.gpus import GPU, GPUS
from dalle.planner.memory import FP32, HALF, ParallelLayout, StepEstimate, memory, traffic
from dalle.planner.table import print_plan
from dalle.runs.kinds import EACH_KIND, take_kind
from dalle.train.config import POWERSGD_RANKS, compression_rate


@configuration
class PlanOptions:
    """Estimates what a training run needs."""

    num_gpus: int = 8
    """GPUs in all."""
    gpu: Literal[*GPUS] = "h100"
    """Their model."""
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
    json: Path | None = None
    """File for the plan, which is also printed."""

    def __post_init__(self):
        super().__post_init__()  # that of the training's arguments
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must lie in (0, 1], got {self.mfu}")
        for name in (field.name for field in fields(PlanOptions)):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{name.replace('_', '-')} must be positive, got {value}")

    def hardware(self) -> GPU:
        """The GPU with the numbers that the options override."""
        changes = {
            "memory": self.max_memory_gib,
            "fp32": self.peak_flops,
            "half": self.peak_flops,
            "inside": self.intra_node_gbps and self.intra_node_gbps * 1e9,
            "between": self.inter_node_gbps and self.inter_node_gbps * 1e9,
            "per_node": self.gpus_per_node,
        }
        return replace(GPUS[self.gpu], **{name: value for name, value in changes.items() if value})


@configuration
class DVAEPlan(PlanOptions, TrainDVAEArgs):
    """Estimates what training the dVAE of a configuration needs."""


@configuration
class TransformerPlan(PlanOptions, TrainTransformerArgs):
    """Estimates what training the transformer of a configuration needs."""


@configuration
class CLIPPlan(PlanOptions, TrainCLIPArgs):
    """Estimates what training the CLIP of a configuration needs."""


PLANS: dict[str, type] = {"dvae": DVAEPlan, "transformer": TransformerPlan, "clip": CLIPPlan}


def plan_training(kind: str, args: Any) -> dict[str, Any]:
    """Estimates the training, prints tables and writes --json; ValueError for an indivisible batch."""
    from dalle.io.files import prepare_file, write_json
    from dalle.transformer.sizes import cache_bytes

    if args.json:
        prepare_file(args.json)
    gpu, train = args.hardware(), args.train
    precision = train.precision
    if precision == "auto":
        precision = "bf16" if gpu.bf16 else "fp32"
    parts = args.num_gpus * train.grad_accum_steps
    if train.batch_size % parts:
        raise ValueError(
            f"train.batch_size {train.batch_size} does not divide among {args.num_gpus} GPUs and "
            f"{train.grad_accum_steps} passes (train.grad_accum_steps); make it a multiple of {parts}"
        )
    batch = train.batch_size // parts
    steps = _estimate_steps(kind, args, batch, precision)
    step = steps["checkpointed" if getattr(args.model, "activation_checkpointing", False) else "kept"]
    of_node = args.shard or gpu.per_node
    shards = {"ddp": 1, "fsdp": args.num_gpus} if args.num_gpus > 1 else {"none": 1}
    if of_node < args.num_gpus:
        shards["hsdp"] = of_node
    half = precision != "fp32"
    layouts = [ParallelLayout(train, mode, args.num_gpus, n, half) for mode, n in shards.items()]
    flops = _flops(kind, args, step, parts)
    plan = {
        "kind": kind,
        "parameters": step.parameters,
        "num_gpus": args.num_gpus,
        "gpu": args.gpu,
        "hardware": asdict(gpu),
        "precision": precision,
        "batch": {"step": train.batch_size, "pass": batch, "grad_accum_steps": train.grad_accum_steps},
        "flops": flops,
        "memory": {how.mode: {name: memory(one, how) for name, one in steps.items()} for how in layouts},
        "traffic": {how.mode: _traffic(kind, args, step, how, gpu) for how in layouts},
        "time": _time(args, sum(flops["needed"].values()), gpu.half if half else gpu.fp32),
    }
    if kind == "transformer":
        sizes = {"fp32": FP32, precision: HALF if half else FP32}
        plan["cache_per_candidate"] = {name: cache_bytes(args.model, size)[1] for name, size in sizes.items()}
    if args.json:
        write_json(args.json, plan)
    print_plan(plan)
    return plan


def _estimate_steps(kind: str, args: Any, batch: int, precision: str) -> dict[str, StepEstimate]:
    """A step that keeps all activations, and for the transformer one with activation checkpointing."""
    from dalle.planner.count import estimate_step

    configs, side = {"kept": args.model}, 0
    if kind == "transformer":
        ways = {"kept": False, "checkpointed": True}
        configs = {name: replace(args.model, activation_checkpointing=on) for name, on in ways.items()}
    elif kind == "dvae":
        side = args.crop or args.data.resolution
    return {name: estimate_step(kind, config, batch, precision, side) for name, config in configs.items()}


def _traffic(kind: str, args: Any, step: StepEstimate, layout: ParallelLayout, gpu: GPU) -> dict[str, Any]:
    """Bytes and seconds of a step's communication, with full gradients and with PowerSGD."""
    variants: dict[str, Any] = {"full": traffic(step, layout, gpu.per_node)}
    if kind == "transformer" and layout.mode in ("ddp", "hsdp"):
        rank = args.train.powersgd.rank or POWERSGD_RANKS.get(args.model.width)
        kept = 1 - compression_rate(args.model.width, rank, layout.shards) if rank else 1
        if kept < 1:
            sent = traffic(step, layout, gpu.per_node, kept)
            variants["powersgd"] = sent | {"rank": rank}
    for sent in variants.values():
        sent["seconds"] = sent["inside"] / gpu.inside + sent["between"] / gpu.between
    return variants


def _flops(kind: str, args: Any, step: StepEstimate, passes: int) -> dict[str, Any]:
    """FLOPs of a step by part: computed, and needed (masked pairs and recomputation are not)."""
    from dalle.transformer.objective import training_flops

    computed = {part: passes * count for part, count in step.flops.items()}
    if kind != "transformer":
        return {"computed": computed, "needed": computed}
    batch, needed = args.train.batch_size, training_flops(args.model)
    return {
        "computed": computed,
        "needed": {
            "attention": batch * needed["attention"],
            "matrices": batch * (needed["matrices"] + needed["logits"]),
        },
        "six_n_of_run": 6 * step.parameters * batch * args.model.layout.seq_len * args.steps,
    }


def _time(args: Any, needed: int, peak: float) -> dict[str, float | None]:
    """Seconds of a step of `needed` FLOPs, and time and cost of the run."""
    seconds = needed / (args.mfu * peak * args.num_gpus)
    hours = seconds * args.steps * args.num_gpus / 3600
    return {
        "mfu": args.mfu,
        "step_seconds": seconds,
        "steps": args.steps,
        "days": seconds * args.steps / 86400,
        "flops_of_run": needed * args.steps,
        "gpu_hours": hours,
        "usd": args.usd_per_gpu_hour and args.usd_per_gpu_hour * hours,
    }


def main() -> None:
    """Command line of plan."""
    with cli_errors():
        overview(sys.argv[1:], __doc__, EACH_KIND)
        kind, words = take_kind(sys.argv[1:])
        if kind not in PLANS:
            raise ValueError(f"plan knows {', '.join(PLANS)}, not {kind}; time a few steps instead")
        plan_training(kind, parse(PLANS[kind], words, description=__doc__))

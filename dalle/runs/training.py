"""One training of a command: its arguments handed to the trainer."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from dalle.hub.registry import checkpoint_meta
from dalle.runs.args import TrainArgs
from dalle.runs.init_weights import overfit_batches
from dalle.train.distributed import Distributed
from dalle.train.trainer import Trainer
from dalle.types import Objective


def start_processes(args: TrainArgs) -> Distributed:
    """Joins the processes of torchrun; ValueError if they do not match --parallel."""
    if args.compile and args.parallel in ("fsdp", "hsdp"):
        raise ValueError(
            f"--compile with --parallel {args.parallel} is untested; omit --compile, or use --parallel ddp"
        )
    timeout = timedelta(minutes=args.dist_timeout_minutes)
    return Distributed.start(args.parallel, args.device, args.shard, timeout)


def run_training(
    kind: str,
    args: TrainArgs,
    dist: Distributed,
    model: nn.Module,
    objective: Objective,
    batches: Callable[[int], Any],
    inputs: dict[str, Any],
    init: dict[str, Any],
    evaluate: Callable[[nn.Module, int], dict[str, Any]],
) -> Path:
    """Trains a model of a command's arguments; returns the run's directory.

    Args:
        inputs: what the model is trained with: hashes and the text tokenizer.
        init: where its first weights come from, as `init_weights` returns it.
    """
    trainer = Trainer(
        model,
        objective,
        overfit_batches(args, batches),
        args.train,
        run_dir=args.directory(kind),
        meta=checkpoint_meta(kind, model, args.record(), inputs) | init,
        steps=args.steps,
        seed=args.seed,
        evaluate=evaluate,
        resume=args.resume,
        dist=dist,
        log_config=args.log,
    )
    trainer.train()
    return trainer.run_dir

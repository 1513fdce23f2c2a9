"""Training commands: processes, a model from fresh or earlier weights, and the trainer."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dalle.compile import compile_layers
from dalle.data import BatchReader, ImageTextLoader
from dalle.hub.init_from import freeze, load_pretrained_weights
from dalle.hub.registry import build_model, checkpoint_meta, load_model
from dalle.io.files import check_meta, check_result, make_directory, read_json
from dalle.meta_device import SkipRandomInit
from dalle.runs import ROOT
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.config import TrainArgs, profile_steps, resume_fingerprint
from dalle.train.distributed import Distributed
from dalle.train.precision import resolve_precision
from dalle.train.trainer import Trainer
from dalle.types import CaptionedImages, Objective


class TrainingRun(AbstractContextManager):
    """One training of a command, as a context that leaves the process group at its end.

    `kind` is one of `MODEL_REGISTRY`, and `args` its `TrainArgs`. With `--overfit-batch N` every step
    trains on the first batch, of N samples.
    """

    def __init__(self, kind: str, args: Any):
        if args.overfit_batch is not None:
            args = replace(args, train=replace(args.train, batch_size=args.overfit_batch))
        self.kind, self.args, self.dir = kind, args, args.out or ROOT / kind
        check_result(self.dir, "checkpoints")
        self.dist = start_processes(args)

    def __exit__(self, *error: object) -> None:
        self.dist.__exit__(*error)

    def build_model(self, inputs: dict[str, Any], **placement: Any) -> nn.Module:
        """The model on its device, with `--init-from`, `--freeze` and `--compile` applied.

        `inputs` is what it is trained with, for its checkpoints: hashes and the text tokenizer.
        """
        args, dist = self.args, self.dist
        resumes = latest_checkpoint(self.dir, ()) is not None  # and no first values are needed
        torch.manual_seed(args.seed)
        with SkipRandomInit() if resumes else nullcontext():
            averaged = args.train.powersgd.rank is None
            model = dist.build(lambda: build_model(self.kind, args.model), averaged)
        if args.freeze:
            frozen = freeze(model, args.freeze)
            print(f"frozen: {len(frozen)} of {sum(1 for _ in model.parameters())} parameters")
        if dist.sharded:
            dist.wrap(model, resolve_precision(args.train.precision, dist.device), averaged)
        else:
            model.to(dist.device, **placement)
        self.model, self.inputs, self.init = model, inputs, self._init_weights(model, inputs)
        if args.compile:
            compile_layers(model, dist.sharded)
        return model

    def train(
        self,
        objective: Objective,
        batches: Callable[[int], Any],
        evaluate: Callable[[nn.Module, int], dict[str, Any]],
    ) -> Path:
        """Trains the model; returns the run's directory."""
        args, first = self.args, cache(lambda: batches(0))
        trainer = Trainer(
            self.model,
            objective,
            batches if args.overfit_batch is None else lambda step: first(),
            args.train,
            run_dir=self.dir,
            meta=checkpoint_meta(self.kind, self.model, resume_fingerprint(args), self.inputs) | self.init,
            steps=args.steps,
            seed=args.seed,
            evaluate=evaluate,
            resume=args.resume,
            dist=self.dist,
            log_config=args.log,
            profile=profile_steps(args.profile),
        )
        trainer.train()
        return self.dir

    def _init_weights(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Where the first weights come from, for meta.json; a resumed run does not read the source again."""
        args = self.args
        if checkpoint := latest_checkpoint(self.dir, ()):
            init = check_meta(read_json(checkpoint / "meta.json"), self.kind, self.dir).get("init")
            if args.init_from and (init is None or init.get("name") != args.init_from.resolve().name):
                source = f"from {init.get('name')}" if init else "from fresh weights"
                raise ValueError(f"the run started {source}, not from {args.init_from}; give another --out")
            return {"init": init} if init else {}
        if args.init_from is None:
            return {}
        part = load_model(args.init_from, self.kind)
        grown = load_pretrained_weights(self.kind, model, part.model)
        grown = f" ({', '.join(grown)})" if grown else ""
        print(f"{self.kind}: starts from the weights of {args.init_from}{grown}")
        makers = (("text_hash", "text tokenizer", "text ids"), ("dvae", "dVAE", "image codes"))
        for name, maker, ids in makers:
            if name in inputs and inputs[name] != part.inputs.get(name, inputs[name]):
                print(f"note: the source was trained with another {maker}: its {ids} may mean something else")
        return {"init": {"name": args.init_from.resolve().name, "weights": part.hash}}


def start_processes(args: TrainArgs) -> Distributed:
    """Joins the processes of torchrun; ValueError if they do not match the arguments."""
    mode, launched = args.parallel, "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
    shard = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if args.shard is None else args.shard
    if args.shard is not None and mode != "hsdp":
        raise ValueError(f"--shard is for --parallel hsdp, not for {mode}; omit it")
    if mode == "none" and world_size > 1:
        raise ValueError(
            f"torchrun started {world_size} processes, and with --parallel none each would train alone; "
            "add --parallel ddp, fsdp or hsdp, or start it without torchrun"
        )
    if mode != "none" and not launched:
        raise ValueError(f"--parallel {mode} needs torchrun: torchrun --nproc-per-node 2 SCRIPT ...")
    if mode == "hsdp" and (shard < 1 or world_size % shard):
        raise ValueError(
            f"{world_size} processes do not divide into groups of {shard} that share parameters; "
            "set --shard to a divisor, or start as many processes on each machine"
        )
    return Distributed.start(mode, args.device, args.shard, args.dist_timeout_minutes)


def open_loader(
    augment: str, dataset: CaptionedImages, collate: Any, run: TrainingRun, receive: Any = None
) -> ImageTextLoader:
    """The dataloader of a training; <out>/bad_samples.jsonl names bad samples."""
    args, dist = run.args, run.dist
    data, size = args.data, args.train.batch_size
    reader = BatchReader(dataset, size, args.seed, augment, collate, dist.rank, dist.world_size)
    log, pin = make_directory(run.dir) / "bad_samples.jsonl", dist.device.type == "cuda"
    return ImageTextLoader(
        reader, args.steps, data.workers, data.prefetch, log, data.max_bad_fraction, receive, pin
    )

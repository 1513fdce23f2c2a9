"""Trainer: the training loop for every model family, given an objective.

A step is a function of state, seed and step number, so N steps equal k steps, a resume and N - k steps, bit
for bit.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dalle.io.files import check_meta, read_json
from dalle.precision import tf32
from dalle.train.checkpoint import latest_checkpoint, restore
from dalle.train.checkpoint_saver import RunGuard
from dalle.train.config import LogConfig, Resume, TrainConfig
from dalle.train.distributed import Distributed
from dalle.train.grad_scaler import build_grad_scaler
from dalle.train.loggers import Loggers, Numbers, ThroughputMeter, peak_flops, to_numbers
from dalle.train.nonfinite import NonfiniteGuard
from dalle.train.optimizer import ReduceLROnPlateau, build_optimizers
from dalle.train.powersgd import build_powersgd
from dalle.train.precision import autocast, resolve_precision
from dalle.train.profiler import StepProfiler
from dalle.train.state import EMA, TrainState
from dalle.train.step import to_device, train_step
from dalle.types import Loss, Objective, StepCost


@dataclass
class Trainer:
    """Trains a model until `steps` steps are done; a family gives an objective, never a subclass."""

    model: nn.Module
    """On its device."""
    objective: Objective
    """(model, batch, step) -> Loss; may have methods step_cost and random_baseline (dalle/types.py)."""
    batches: Callable[[int], Any]
    """step -> this process's shard of the batch; the same step must give the same batch."""
    config: TrainConfig
    """Optimizer, EMA, precision, intervals of logs, evaluations and checkpoints."""
    run_dir: Path
    """Receives log.jsonl and checkpoints/."""
    meta: dict[str, Any]
    """What makes a checkpoint describe itself: kind, model_config, config, inputs."""
    steps: int
    """Steps in all."""
    seed: int = 0
    """Of all random numbers."""
    evaluate: Callable[[nn.Module, int], dict[str, Any]] | None = None
    """(model with EMA weights, step) -> metrics; images among the values are logged as images."""
    resume: Resume = "auto"
    """auto resumes the run in `run_dir`, changed also with another configuration, never refuses it."""
    dist: Distributed | None = None
    """The processes that train together; default: a single one."""
    log_config: LogConfig = LogConfig()
    """Loggers besides log.jsonl."""
    profile: tuple[int, int] = (0, 0)
    """First and last step of a profile (dalle/train/profiler.py); (0, 0) for none."""
    state: TrainState = field(init=False)

    def __post_init__(self):
        self.dist = self.dist or Distributed(device=next(self.model.parameters()).device)
        self.meta = self.meta | {"steps": self.steps}
        self.precision = resolve_precision(self.config.precision, self.dist.device)
        check_batch_size(self.config, self.dist)

    def train(self) -> TrainState:
        """Trains from the newest valid checkpoint of `run_dir`, if there is one.

        Raises:
            ValueError: the directory holds another run, is in use, or no checkpoint is valid.
            FloatingPointError: loss or gradient were not finite too often in a row.
            OSError: a checkpoint could not be written.
            Preempted: (a SystemExit of status 75) a signal stopped the run; it has saved.
        """
        config = self.config
        with tf32(config.tf32), RunGuard(self.run_dir, self.meta, config) as guard:
            self.state = init_train_state(self.model, config, self.seed, self.dist)
            changes, step = self._maybe_resume(guard.control), self.state.step
            loggers = Loggers(self.run_dir, step, self.log_config, self.meta, self.dist.is_main)
            steps = self.profile if self.dist.is_main else (0, 0)
            with closing(loggers), StepProfiler(steps, self.run_dir) as profiler:
                if changes:
                    loggers.write(step, {"changes": changes})
                self._train_loop(guard, loggers, profiler)
        return self.state

    def _train_loop(self, guard: RunGuard, loggers: Loggers, profiler: StepProfiler) -> None:
        state, config, dist = self.state, self.config, self.dist
        peak = peak_flops(dist.device, self.precision, self.log_config.peak_flops)
        meter = ThroughputMeter(dist.device, dist.world_size, peak)
        count = getattr(self.objective, "step_cost", lambda model, batch: StepCost(0))
        baseline = getattr(self.objective, "random_baseline", lambda model: {})
        cost: StepCost | None = None
        disable = None if dist.is_main else True
        bar = tqdm(total=self.steps, initial=state.step, desc=self.meta["kind"], unit="step", disable=disable)
        self.model.train()
        while state.step < self.steps:
            profiler.start_step(state.step + 1)
            with meter.timed("waiting"):
                batch = to_device(self.batches(state.step), dist.device)
            cost = cost or count(self.model, batch)
            step = state.step + 1
            last = step == self.steps
            logs = last or step == 1 or step % config.log_every == 0
            look = logs or step % config.eval_every == 0 or step % config.save_every == 0
            passes, precision = config.grad_accum_steps, self.precision
            loss, norm = train_step(
                state, batch, self.objective, config.optimizer, precision, self.seed, dist, passes, look
            )
            profiler.end_step(state.step)
            meter.steps += 1
            bar.update()
            if logs:
                numbers = step_metrics(state, loss, norm)
                if state.step == 1:
                    numbers |= {f"baseline/{name}": x for name, x in baseline(self.model).items()}
                loggers.write(state.step, numbers | meter.lap(cost))
                bar.set_postfix(loss=f"{numbers['loss']:.4f}", skipped=numbers["skipped_steps"])
            with meter.timed("paused"):
                if self.evaluate and (last or state.step % config.eval_every == 0):
                    self._evaluate(loggers)
                guard.on_step_end(state)
        bar.close()

    def _evaluate(self, loggers: Loggers) -> None:
        """Evaluates the EMA weights in training's precision; random numbers and mode stay as they were."""
        state, dist = self.state, self.dist
        gpus = [dist.device] if dist.device.type == "cuda" else []
        self.model.eval()
        with torch.random.fork_rng(gpus), state.ema.applied(self.model), torch.no_grad():
            torch.manual_seed(self.seed)
            with autocast(self.precision, dist.device):
                scores = dist.forward(self.model, self.evaluate, state.step)
            if dist.sharded:
                dist.wrapped.reshard()  # frees parameters that a pass without gradients leaves gathered
        self.model.train()
        images = {name: value for name, value in scores.items() if isinstance(value, Image.Image)}
        numbers = to_numbers({name: value for name, value in scores.items() if name not in images})
        loggers.write(state.step, {f"val/{name}": value for name, value in numbers.items()})
        for name, image in images.items():
            loggers.log_image(state.step, name, image)
        if dist.is_main:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            tqdm.write(f"{self.meta['kind']} step {state.step}: {shown}")

    def _maybe_resume(self, control: Distributed) -> list[str]:
        """Loads the newest valid checkpoint, if any; returns changes of the configuration."""
        folder = latest_checkpoint(self.run_dir, None, control)
        if folder is None:
            return []
        if self.resume == "never":
            raise ValueError(f"{self.run_dir} holds a run; give another --out, or --resume auto to resume it")
        old = check_meta(read_json(folder / "meta.json"), self.meta["kind"], self.run_dir)
        changes = differences(old["config"], self.meta["config"])
        inputs = (old["inputs"], self.meta["inputs"])
        hashes = ({name: x for name, x in each.items() if isinstance(x, str)} for each in inputs)
        changes += differences(*hashes, "inputs")
        if changes and self.resume != "changed":
            raise ValueError(
                f"{self.run_dir} holds a run with another configuration ({'; '.join(changes)}); give another "
                "--out, or --resume changed to resume with the new one"
            )
        restore(folder, self.state, control)
        if control.is_main:
            saved = datetime.fromtimestamp((folder / "meta.json").stat().st_mtime)
            doing = f"resuming from step {self.state.step} of {self.steps}"
            if self.state.step > self.steps:
                doing = f"step {self.state.step} is done, more than --steps {self.steps}: nothing is trained"
            print(f"{self.meta['kind']}: {doing} ({folder}, saved {saved:%Y-%m-%d %H:%M:%S})")
            if changes:
                print(f"note: from here on with another configuration: {'; '.join(changes)}")
        return changes


def init_train_state(model: nn.Module, config: TrainConfig, seed: int, dist: Distributed) -> TrainState:
    """The state before the first step; wraps the model for the processes."""
    precision = resolve_precision(config.precision, dist.device)
    dist.wrap(model, precision, averaged=config.powersgd.rank is None)
    state = TrainState(
        model,
        build_optimizers(model, config.optimizer),
        EMA(model, config.ema),
        build_grad_scaler(model) if precision == "fp16" else None,
    )
    state.extras["nonfinite"] = NonfiniteGuard(config.max_skipped_steps, dist.device)
    if config.optimizer.plateau.max_reductions:
        state.extras["plateau"] = ReduceLROnPlateau(config.optimizer.plateau)
    if dist.replicas and (powersgd := build_powersgd(model, config.powersgd, seed, dist.replicas)):
        state.extras["powersgd"] = powersgd
    return state


def check_batch_size(config: TrainConfig, dist: Distributed) -> None:
    """ValueError if the batch does not divide among processes and passes, or Muon would get shards."""
    shards = dist.world_size * config.grad_accum_steps
    if config.batch_size % shards:
        raise ValueError(
            f"train.batch_size {config.batch_size} does not divide among {dist.world_size} processes and "
            f"{config.grad_accum_steps} passes (train.grad_accum_steps); make it a multiple of {shards}"
        )
    if dist.sharded and config.optimizer.muon_lr_scale is not None:
        raise ValueError(
            f"Muon needs whole matrices, and --parallel {dist.mode} shards them; "
            "use --parallel ddp, or omit train.optimizer.muon_lr_scale"
        )


def step_metrics(state: TrainState, loss: Loss, norm: Tensor) -> Numbers:
    numbers = to_numbers({"loss": loss.total.detach(), "grad_norm": norm, **loss.metrics})
    if state.scales:
        numbers["grad_scale_log2"] = state.scales.values.log2().tolist()
    if plateau := state.extras.get("plateau"):
        numbers["lr_reductions"] = plateau.reductions
    return numbers | {"lr": float(state.optimizers[-1].param_groups[0]["lr"])}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Differences of two configurations, one line each: "train.batch_size was 16, is 32".

    A setting that the old one does not know, of an earlier version, was off.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            if key not in old and not new[key]:
                continue
            lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]

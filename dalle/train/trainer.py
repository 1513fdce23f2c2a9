"""The loop. It receives a model, an objective and a rule for the batch of a step, and knows no family.

Every step is a function of the state, the seed and the step's number: the batch and the random
numbers are drawn from (seed, step). So N steps equal k, a resume, and N - k, bit for bit.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dalle.io.files import read_json
from dalle.io.format import check_meta
from dalle.train.checkpoint import latest_valid_checkpoint, restore, saved_at
from dalle.train.checkpoint_saver import Keeper
from dalle.train.config import LogConfig, Resume, TrainConfig
from dalle.train.distributed import Parallel
from dalle.train.ema import EMA
from dalle.train.loggers import Loggers, NullLogger, Numbers, to_numbers
from dalle.train.lr_schedule import ReduceLROnPlateau
from dalle.train.nonfinite import NonfiniteGuard
from dalle.train.optimizer import build_optimizers
from dalle.train.powersgd import build_powersgd
from dalle.train.precision import autocast, resolve_precision
from dalle.train.state import TrainState
from dalle.train.step import build_grad_scaler, to_device, train_step
from dalle.train.throughput import ThroughputMeter, peak_flops
from dalle.types import Loss, Objective, StepCost

Batches = Callable[[int], Any]
"""The batch of a step."""
Evaluate = Callable[[nn.Module, int], dict[str, Any]]
"""Measures the averaged weights at a step; images among the values are saved and shown."""

LOG = LogConfig()
"""log.jsonl alone."""


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    config: TrainConfig,
    *,
    steps: int,
    seed: int,
    run_dir: Path,
    meta: dict[str, Any],
    evaluate: Evaluate | None = None,
    resume: Resume = "auto",
    parallel: Parallel | None = None,
    log: LogConfig = LOG,
) -> TrainState:
    """Trains until `steps` updates are done, from the newest checkpoint of `run_dir` if there is one.

    Args:
        model: on its device.
        objective: (model, batch, step) -> Loss.
        batches: step -> this process's part of the batch; the same step must give the same.
        config: optimizer, averaging, rhythm of logs, evaluations and checkpoints.
        steps: updates in all.
        seed: of all random numbers.
        run_dir: receives log.jsonl and checkpoints/.
        meta: what makes a checkpoint describe itself: kind, config, run, links.
        evaluate: called with the averaged weights in place.
        resume: "auto" goes on where the run stopped, "changed" even with another configuration, "never" refuses a
            directory that holds a run.
        parallel: the processes that train together, each calling this; one alone unless given.
        log: where the run tells what it does, beside log.jsonl.

    Raises:
        ValueError: the directory holds another run, or another process is at work in it, or no checkpoint is whole,
            or the batch does not divide among the processes.
        FloatingPointError: loss or gradient were not finite too often in a row; names the first bad tensor.
        OSError: a checkpoint could not be written.
        Stopped: (a SystemExit of status 75) a signal asked the run to stop; it has saved.
    """
    parallel = parallel or Parallel(device=next(model.parameters()).device)
    check_parts(config, parallel)
    meta = meta | {"steps": steps}
    with Keeper(run_dir, meta, steps, config.save_every, config.keep_last, config.keep_every) as keeper:
        state = start(model, config, seed, parallel)
        changes = _prepare(run_dir, state, meta, resume, keeper)
        peak = peak_flops(
            parallel.device, resolve_precision(config.precision, parallel.device), log.peak_flops
        )
        with closing(Loggers(run_dir, state.step, log, meta) if parallel.is_main else NullLogger()) as logs:
            if changes:
                logs.write(state.step, {"changes": changes})
            _train(state, objective, batches, config, seed, evaluate, parallel, keeper, logs, peak)
    return state


def start(model: nn.Module, config: TrainConfig, seed: int, parallel: Parallel) -> TrainState:
    """Everything that training changes, as it is before the first update; the model is handed to the processes."""
    precision = resolve_precision(config.precision, parallel.device)
    parallel.wrap(model, precision, averaged=config.powersgd.rank is None)
    state = TrainState(
        model,
        build_optimizers(model, config.optimizer),
        EMA(model, config.ema),
        build_grad_scaler(model) if precision == "fp16" else None,
    )
    state.extras["nonfinite"] = NonfiniteGuard(config.max_skipped_steps)
    if config.optimizer.plateau.max_reductions:
        state.extras["plateau"] = ReduceLROnPlateau(config.optimizer.plateau)
    if parallel.replicas and (powersgd := build_powersgd(model, config.powersgd, seed, parallel.replicas)):
        state.extras["powersgd"] = powersgd
    return state


def _train(
    state: TrainState,
    objective: Objective,
    batches: Batches,
    config: TrainConfig,
    seed: int,
    evaluate: Evaluate | None,
    parallel: Parallel,
    keeper: Keeper,
    logs: Loggers | NullLogger,
    peak: float | None,
) -> None:
    """The steps of `fit`."""
    model, device, steps, kind = state.model, parallel.device, keeper.steps, keeper.meta["kind"]
    precision = resolve_precision(config.precision, device)
    bar = tqdm(
        total=steps, initial=state.step, desc=kind, unit="step", disable=None if parallel.is_main else True
    )
    meter, work = ThroughputMeter(device, parallel.world, peak), None
    model.train()
    while state.step < steps:
        with meter.waiting():
            batch = to_device(batches(state.step), device)
        work = work or work_of(objective, model, batch)
        loss, norm = train_step(
            state, batch, objective, config.optimizer, precision, seed, parallel, config.grad_accum_steps
        )
        meter.update(work)
        bar.update()
        last = state.step == steps
        if state.step % config.log_every == 0 or state.step == 1 or last:
            numbers = step_numbers(state, loss, norm)
            logs.write(
                state.step, numbers | (chance(objective, model) if state.step == 1 else {}) | meter.lap()
            )
            bar.set_postfix(loss=f"{numbers['loss']:.4f}", skipped=numbers["skipped_steps"])
        with meter.pause():
            if evaluate and (state.step % config.eval_every == 0 or last):
                told = _told(_evaluate(evaluate, state, seed, precision, parallel), state, logs)
                if parallel.is_main:
                    tqdm.write(f"{kind} step {state.step}: {told}")
            keeper.after_step(state)
    bar.close()


def check_parts(config: TrainConfig, parallel: Parallel) -> None:
    """ValueError where a batch does not divide into parts of one size, or an optimizer needs whole matrices."""
    parts = parallel.world * config.grad_accum_steps
    if config.batch_size % parts:
        raise ValueError(
            f"train.batch_size {config.batch_size} does not divide among {parallel.world} processes and "
            f"{config.grad_accum_steps} passes in each (train.grad_accum_steps); make it a multiple of {parts}"
        )
    if parallel.sharded and config.optimizer.muon_lr_scale is not None:
        raise ValueError(
            f"Muon needs whole matrices, and --parallel {parallel.mode} slices them; "
            "take --parallel ddp, or leave train.optimizer.muon_lr_scale out"
        )


def step_numbers(state: TrainState, loss: Loss, norm: Tensor) -> Numbers:
    """What is logged of the update just made."""
    numbers = to_numbers({"loss": loss.total.detach(), "grad_norm": norm, **loss.metrics})
    if state.scales:
        numbers["grad_scale_log2"] = state.scales.values.log2().tolist()
    if plateau := state.extras.get("plateau"):
        numbers["lr_reductions"] = plateau.halved
    return numbers | {"lr": float(state.optimizers[-1].param_groups[0]["lr"])}


def work_of(objective: Objective, model: nn.Module, batch: Any) -> StepCost:
    """What an update asks of the machine, if the objective tells."""
    tell = getattr(objective, "work", None)
    return tell(model, batch) if tell else StepCost(0)


def chance(objective: Objective, model: nn.Module) -> Numbers:
    """What a model that knows nothing reaches, as {"baseline/NAME": value}, if the objective tells."""
    tell = getattr(objective, "chance", None)
    return {f"baseline/{name}": value for name, value in tell(model).items()} if tell else {}


def _evaluate(
    evaluate: Evaluate, state: TrainState, seed: int, precision: str, parallel: Parallel
) -> dict[str, Any]:
    """Scores of the averaged weights; training's random numbers and mode stay as they were.

    Every process measures the same, in the number format of training, since slices of a layer are gathered in it.
    """
    state.model.eval()
    with torch.random.fork_rng(), state.ema.applied(state.model), torch.no_grad():
        torch.manual_seed(seed)
        with autocast(precision, parallel.device):
            scores = parallel.run(state.model, evaluate, state.step)
        parallel.release()
    state.model.train()
    return scores


def _told(scores: dict[str, Any], state: TrainState, logs: Loggers | NullLogger) -> str:
    """Loggers numbers and images of an evaluation; the numbers in words."""
    images = {name: value for name, value in scores.items() if isinstance(value, Image.Image)}
    numbers = to_numbers({name: value for name, value in scores.items() if name not in images})
    logs.write(state.step, {f"val/{name}": value for name, value in numbers.items()})
    for name, image in images.items():
        logs.log_image(state.step, name, image)
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _prepare(
    run_dir: Path, state: TrainState, meta: dict[str, Any], resume: str, keeper: Keeper
) -> list[str]:
    """Takes up the run that lies in the directory, if there is one; in what its configuration was another."""
    found = latest_valid_checkpoint(run_dir, keeper.ranks)
    if found is None:
        return []
    if resume == "never":
        raise ValueError(f"{run_dir} holds a run; give another --out, or --resume auto to go on with it")
    old = check_meta(read_json(found / "meta.json"), meta["kind"], run_dir)
    changes = differences(old["run"], meta["run"]) + differences(_hashes(old), _hashes(meta), "links")
    if changes and resume != "changed":
        raise ValueError(
            f"{run_dir} holds a run with another configuration ({'; '.join(changes)}); give another --out, or "
            "--resume changed to go on with the new one"
        )
    restore(found, state, keeper.ranks)
    if keeper.ranks.rank == 0:
        print(
            f"{meta['kind']}: going on from step {state.step} of {meta['steps']} ({found}, saved {saved_at(found)})"
        )
        if changes:
            print(f"note: with another configuration from here on: {'; '.join(changes)}")
    return changes


def _hashes(meta: dict[str, Any]) -> dict[str, str]:
    """Hashes of what a run was trained with."""
    return {name: value for name, value in meta["links"].items() if isinstance(value, str)}


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Where two plain configurations differ, one line each: "train.batch_size: 16 was, 32 is"."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        return lines
    return [] if old == new else [f"{place} was {old!r}, is {new!r}"]

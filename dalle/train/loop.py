"""The loop. It receives a model, an objective and a rule for the batch of a step, and knows no family.

Every step is a function of the state, the seed and the step's number: the batch and the random
numbers are drawn from (seed, step). So N steps equal k, a resume, and N - k, bit for bit.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dalle.files import make_directory, read_json
from dalle.train.checkpoint import check_meta, latest_checkpoint, restore, save_checkpoint
from dalle.train.ema import AveragedWeights, EMAConfig
from dalle.train.log import JSONLines, Numbers, Silence, to_numbers
from dalle.train.optim import OptimizerConfig, build_optimizers
from dalle.train.parallel import Parallel
from dalle.train.precision import Precision, autocast, resolve_precision
from dalle.train.state import TrainState
from dalle.train.step import gradient_scales, to_device, train_step
from dalle.types import Loss, Objective

Batches = Callable[[int], Any]
"""The batch of a step."""
Evaluate = Callable[[nn.Module, int], dict[str, float]]
"""Measures the averaged weights at a step."""


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; the defaults are the transformer's (B.2)."""

    batch_size: int = 1024
    """Pictures in an update, over all processes (B.2)."""
    accumulate: int = 1
    """Passes that each process's part of a batch is divided among: less memory, the same loss and gradient."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, or Muon and AdamW."""
    ema: EMAConfig = EMAConfig()
    """Averaging of the weights."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16 (autocast; fp16 with a gradient scale per resblock, 2.4), or auto: bf16 where the
    device has it in hardware, else fp32."""
    log_every: int = 10
    """Updates between two lines of the log."""
    eval_every: int = 1000
    """Updates between two evaluations; the last step is always evaluated."""
    save_every: int = 1000
    """Updates between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints kept."""

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "log_every", "eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


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
    resume: Literal["auto", "never"] = "auto",
    parallel: Parallel | None = None,
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
        resume: "auto" goes on where the run stopped, "never" refuses a directory that holds a run.
        parallel: the processes that train together, each calling this; one alone unless given.

    Raises:
        ValueError: the directory holds another run, or the batch does not divide among the processes.
        FloatingPointError: the loss or the gradient is not finite; names the first bad tensor.
    """
    device = next(model.parameters()).device
    precision = resolve_precision(config.precision, device)
    parallel = parallel or Parallel(device=device)
    check_parts(config, parallel)
    parallel.wrap(model, precision)
    state = TrainState(
        model, build_optimizers(model, config.optimizer), AveragedWeights(model, config.ema),
        gradient_scales(model) if precision == "fp16" else None,
    )  # fmt: skip
    _prepare(run_dir, state, meta, resume)
    log = JSONLines(run_dir / "log.jsonl", state.step) if parallel.is_main else Silence()
    quiet = None if parallel.is_main else True
    bar = tqdm(total=steps, initial=state.step, desc=str(meta["kind"]), unit="step", disable=quiet)
    model.train()
    while state.step < steps:
        started = time.perf_counter()
        batch = to_device(batches(state.step), device)
        waited = time.perf_counter() - started
        loss, norm = train_step(state, batch, objective, config.optimizer, precision, seed, parallel, config.accumulate)
        bar.update()
        last = state.step == steps
        if state.step % config.log_every == 0 or state.step == 1 or last:
            numbers = step_numbers(state, loss, norm, config.optimizer)
            log.write(state.step, numbers | {"data_wait": waited, "seconds": time.perf_counter() - started})
            bar.set_postfix(loss=f"{numbers['loss']:.4f}")
        if evaluate and (state.step % config.eval_every == 0 or last):
            scores = _evaluate(evaluate, state, seed, precision, parallel)
            log.write(state.step, {f"eval/{name}": value for name, value in scores.items()})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            tqdm.write(f"{meta['kind']} step {state.step}: {shown}")
        if state.step % config.save_every == 0 or last:
            save_checkpoint(run_dir, state, meta | {"steps": steps}, config.keep, write=parallel.is_main)
            parallel.barrier()
    bar.close()
    return state


def check_parts(config: TrainConfig, parallel: Parallel) -> None:
    """ValueError where a batch does not divide into parts of one size, or an optimizer needs whole matrices."""
    parts = parallel.world * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"train.batch_size {config.batch_size} does not divide among {parallel.world} processes and "
            f"{config.accumulate} passes in each (train.accumulate); make it a multiple of {parts}"
        )
    if parallel.sharded and config.optimizer.muon is not None:
        raise ValueError(
            f"Muon needs whole matrices, and --parallel {parallel.mode} slices them; "
            "take --parallel ddp, or leave train.optimizer.muon out"
        )


def step_numbers(state: TrainState, loss: Loss, norm: Tensor, optim: OptimizerConfig) -> Numbers:
    """What is logged of the update just made."""
    numbers = to_numbers({"loss": loss.total.detach(), "gradient_norm": norm, **loss.metrics})
    if state.scales:
        numbers["log2_scales"] = state.scales.values.log2().tolist()
    return numbers | {"step_size": optim.rate(state.step - 1)}


def _evaluate(evaluate: Evaluate, state: TrainState, seed: int, precision: str, parallel: Parallel) -> dict[str, float]:
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
    return to_numbers(scores)


def _prepare(run_dir: Path, state: TrainState, meta: dict[str, Any], resume: str) -> None:
    """Makes the run's directory, or takes up the run that lies there."""
    make_directory(run_dir)
    found = latest_checkpoint(run_dir)
    if found is None:
        return
    if resume == "never":
        raise ValueError(f"{run_dir} holds a run; give another --out, or --resume auto to go on with it")
    old = read_json(found / "meta.json")
    check_meta(old, meta["kind"], run_dir)
    changes = differences(old["run"], meta["run"]) + differences(_hashes(old), _hashes(meta), "links")
    if changes:
        raise ValueError(f"{run_dir} holds a run with another configuration ({'; '.join(changes)}); give another --out")
    restore(found, state)
    print(f"{meta['kind']}: going on from step {state.step} of {run_dir}")


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

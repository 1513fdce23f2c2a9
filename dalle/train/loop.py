"""The loop. It receives a model, an objective and a rule for the batch of a step, and knows no family.

Every step is a function of the state, the seed and the step's number: the batch and the random
numbers are drawn from (seed, step). So N steps equal k, a resume, and N - k, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dalle.files import make_directory, read_json
from dalle.train.checkpoint import check_meta, latest_checkpoint, restore, save_checkpoint
from dalle.train.ema import AveragedWeights, EMAConfig
from dalle.train.log import Numbers, to_numbers
from dalle.train.meters import Meter, peak_flops
from dalle.train.nonfinite import Nonfinite
from dalle.train.optim import OptimizerConfig, build_optimizers
from dalle.train.plateau import Plateau
from dalle.train.precision import Precision, resolve_precision
from dalle.train.state import TrainState
from dalle.train.step import gradient_scales, to_device, train_step
from dalle.train.writers import LogConfig, Logs
from dalle.types import Loss, Objective, Work

Batches = Callable[[int], Any]
"""The batch of a step."""
Evaluate = Callable[[nn.Module, int], dict[str, Any]]
"""Measures the averaged weights at a step; pictures among the values are saved and shown."""


LOG = LogConfig()
"""log.jsonl alone."""


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; the defaults are the transformer's (B.2)."""

    batch_size: int = 1024
    """Pictures in an update (B.2)."""
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
    max_nonfinite: int = 8
    """Updates in a row, skipped because loss or gradient is not finite, that end the run; 1 ends it at the first.
    The paper skipped 5 % (E.2): 8 in a row are no chance. In fp16, where only the gradient is not finite, 125 times as
    many, since a scale comes down once in 125 updates (D)."""
    keep: int = 2
    """Checkpoints kept."""

    def __post_init__(self):
        for name in ("batch_size", "log_every", "eval_every", "save_every", "keep", "max_nonfinite"):
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
    log: LogConfig = LOG,
) -> TrainState:
    """Trains until `steps` updates are done, from the newest checkpoint of `run_dir` if there is one.

    Args:
        model: on its device.
        objective: (model, batch, step) -> Loss.
        batches: step -> batch; the same step must give the same batch.
        config: optimizer, averaging, rhythm of logs, evaluations and checkpoints.
        steps: updates in all.
        seed: of all random numbers.
        run_dir: receives log.jsonl and checkpoints/.
        meta: what makes a checkpoint describe itself: kind, config, run, links.
        evaluate: called with the averaged weights in place.
        resume: "auto" goes on where the run stopped, "never" refuses a directory that holds a run.
        log: where the run tells what it does, beside log.jsonl.

    Raises:
        ValueError: the directory holds another run.
        FloatingPointError: loss or gradient were not finite too often in a row; names the first bad tensor.
    """
    device = next(model.parameters()).device
    precision = resolve_precision(config.precision, device)
    state = TrainState(
        model, build_optimizers(model, config.optimizer), AveragedWeights(model, config.ema),
        gradient_scales(model) if precision == "fp16" else None,
    )  # fmt: skip
    state.extras["nonfinite"] = Nonfinite(config.max_nonfinite)
    if config.optimizer.plateau.halvings:
        state.extras["plateau"] = Plateau(config.optimizer.plateau)
    _prepare(run_dir, state, meta, resume)
    logs = Logs(run_dir, state.step, log, meta)
    bar = tqdm(total=steps, initial=state.step, desc=str(meta["kind"]), unit="step", disable=None)
    meter, work = Meter(device, peak_flops(device, precision, log.peak_flops)), None
    model.train()
    while state.step < steps:
        with meter.waiting():
            batch = to_device(batches(state.step), device)
        work = work or work_of(objective, model, batch)
        loss, norm = train_step(state, batch, objective, config.optimizer, precision, seed)
        meter.update(work)
        bar.update()
        last = state.step == steps
        if state.step % config.log_every == 0 or state.step == 1 or last:
            numbers = step_numbers(state, loss, norm)
            logs.write(state.step, numbers | (chance(objective, model) if state.step == 1 else {}) | meter.lap())
            bar.set_postfix(loss=f"{numbers['loss']:.4f}", skipped=numbers["skipped"])
        if evaluate and (state.step % config.eval_every == 0 or last):
            with meter.pause():
                tqdm.write(f"{meta['kind']} step {state.step}: {_told(_evaluate(evaluate, state, seed), state, logs)}")
        if state.step % config.save_every == 0 or last:
            with meter.pause():
                save_checkpoint(run_dir, state, meta | {"steps": steps}, config.keep)
    bar.close()
    logs.close()
    return state


def step_numbers(state: TrainState, loss: Loss, norm: Tensor) -> Numbers:
    """What is logged of the update just made."""
    numbers = to_numbers({"loss": loss.total.detach(), "gradient_norm": norm, **loss.metrics})
    if state.scales:
        numbers["log2_scales"] = state.scales.values.log2().tolist()
    if plateau := state.extras.get("plateau"):
        numbers["halvings"] = plateau.halved
    return numbers | {"step_size": float(state.optimizers[-1].param_groups[0]["lr"])}


def work_of(objective: Objective, model: nn.Module, batch: Any) -> Work:
    """What an update asks of the machine, if the objective tells."""
    tell = getattr(objective, "work", None)
    return tell(model, batch) if tell else Work(0)


def chance(objective: Objective, model: nn.Module) -> Numbers:
    """What a model that knows nothing reaches, as {"chance/NAME": value}, if the objective tells."""
    tell = getattr(objective, "chance", None)
    return {f"chance/{name}": value for name, value in tell(model).items()} if tell else {}


def _evaluate(evaluate: Evaluate, state: TrainState, seed: int) -> dict[str, Any]:
    """Scores of the averaged weights; training's random numbers and mode stay as they were."""
    state.model.eval()
    with torch.random.fork_rng(), state.ema.applied(state.model), torch.no_grad():
        torch.manual_seed(seed)
        scores = evaluate(state.model, state.step)
    state.model.train()
    return scores


def _told(scores: dict[str, Any], state: TrainState, logs: Logs) -> str:
    """Logs numbers and pictures of an evaluation; the numbers in words."""
    pictures = {name: value for name, value in scores.items() if isinstance(value, Image.Image)}
    numbers = to_numbers({name: value for name, value in scores.items() if name not in pictures})
    logs.write(state.step, {f"eval/{name}": value for name, value in numbers.items()})
    for name, picture in pictures.items():
        logs.picture(state.step, name, picture)
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


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

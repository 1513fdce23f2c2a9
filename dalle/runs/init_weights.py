"""What a training begins with besides its configuration: weights of another run, frozen parameters, a single
batch."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from torch import nn

from dalle.hub.init_from import freeze, load_pretrained_weights
from dalle.hub.registry import load_model
from dalle.io.files import read_json
from dalle.runs.args import TrainArgs
from dalle.train.checkpoint import latest_checkpoint

Run = TypeVar("Run", bound=TrainArgs)


def init_weights(kind: str, run: TrainArgs, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Puts `--init-from` and `--freeze` into a fresh model; returns what the run's checkpoints say of it.

    A run that goes on keeps what its checkpoint holds and says: the source is not read again.

    Args:
        inputs: what the new run is trained with, to warn of ids that mean something else than in the source.

    Raises:
        ValueError: the source does not fit, a pattern fits nothing, or the run in --out began from another
            source.
    """
    if run.freeze:
        frozen = freeze(model, run.freeze)
        print(f"frozen: {len(frozen)} of {sum(1 for _ in model.parameters())} parameters")
    going_on = latest_checkpoint(run.directory(kind))
    if going_on:
        return _as_before(read_json(going_on / "meta.json").get("init"), run)
    if run.init_from is None:
        return {}
    part = load_model(run.init_from, kind)
    grown = load_pretrained_weights(kind, model, part.model)
    print(f"{kind}: begins with the weights of {run.init_from}" + (f" ({', '.join(grown)})" if grown else ""))
    for name, maker, ids in (("text_hash", "text tokenizer", "text ids"), ("dvae", "dVAE", "image codes")):
        if {name} <= inputs.keys() & part.inputs.keys() and inputs[name] != part.inputs[name]:
            print(f"note: the source was trained with another {maker}: its {ids} may mean something else")
    return {"init": {"name": run.init_from.resolve().name, "weights": part.hash}}


def _as_before(init: dict[str, str] | None, run: TrainArgs) -> dict[str, Any]:
    if run.init_from and (init is None or init["name"] != run.init_from.resolve().name):
        began = f"from {init['name']}" if init else "from fresh weights"
        raise ValueError(f"the run in --out began {began}, not from {run.init_from}; give another --out")
    return {"init": init} if init else {}


def overfit_config(run: Run) -> Run:
    """With `--overfit-batch N` the same run with batches of N."""
    if run.overfit_batch is None:
        return run
    return replace(run, train=replace(run.train, batch_size=run.overfit_batch))


def overfit_batches(run: TrainArgs, batches: Callable[[int], Any]) -> Callable[[int], Any]:
    """With `--overfit-batch` the first batch for every step, else the batches."""
    if run.overfit_batch is None:
        return batches
    first = cache(lambda: batches(0))
    return lambda step: first()

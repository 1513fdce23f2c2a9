"""Train a small CLIP on the same pairs, to rank images (paper section 2.6).

python scripts/train_clip.py --config configs/clip/shapes.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dalle.clip import CLIP, CLIPConfig
from dalle.clip.objective import CLIPObjective
from dalle.config import RESUME_FREE, cli_errors, parse
from dalle.data import DataConfig, StepOfPairs, first_samples, open_dataset, sample_captions
from dalle.hub.registry import build_model
from dalle.runs.args import TrainArgs
from dalle.runs.init_weights import init_weights, overfit_config
from dalle.runs.inputs import load_text_input, loader
from dalle.runs.training import run_training, start_processes
from dalle.schedules import Schedule
from dalle.shapes.corruptions import corrupted_images
from dalle.text import TextTokenizer
from dalle.train import TrainConfig
from dalle.train.config import NO_PLATEAU, EMAConfig, OptimizerConfig
from dalle.train.distributed import Distributed
from dalle.train.precision import compile_layers
from dalle.types import CaptionedImages, ImageTextBatch
from dalle.viz.sample_grids import retrieval_grid

CLIP_TRAINING = TrainConfig(
    batch_size=32_768,
    optimizer=OptimizerConfig(
        lr=Schedule(5e-4, 0.0, 390_000),
        warmup_steps=2_000,
        plateau=NO_PLATEAU,
        beta2=0.98,
        eps=1e-6,
        weight_decay=0.2,
        max_grad_norm=None,
        max_variance=None,
    ),
    ema=EMAConfig(decay=0.99, update_every=25),
)
"""Radford et al., Tables 18 and 20: batch 32,768, 32 epochs of 400M pairs, cosine learning rate."""


@dataclass(frozen=True)
class TrainCLIPArgs(TrainArgs):
    """Trains a CLIP to rank images by their caption."""

    steps: int = 390_000
    """Updates in all (Radford et al.: 32 epochs)."""
    text_tokenizer: Path | None = field(default=None, metadata=RESUME_FREE)
    """Text tokenizer; the newest under runs/ unless given."""
    data: DataConfig = DataConfig()
    """Images and captions."""
    hard_negative_captions: bool = False
    """Every second pair differs from the one before in one attribute; shapes only."""
    hard_negative_images: bool = False
    """Beside each image stands one with a thing out of shape, which its caption must not prefer; shapes only."""
    model: CLIPConfig = CLIPConfig()
    """Shape of both towers."""
    train: TrainConfig = CLIP_TRAINING
    """Optimizer, averaging, rhythm."""
    eval_samples: int = 128
    """Held-out pairs measured at each evaluation."""

    def __post_init__(self):
        super().__post_init__()
        if self.eval_samples < 1:
            raise ValueError(f"eval_samples must be positive, got {self.eval_samples}")
        if self.train.grad_accum_steps > 1:
            raise ValueError(
                "train.grad_accum_steps changes the loss of CLIP, in which each caption meets every image of the batch; "
                "set it to 1, and lower train.batch_size or start more processes where memory is short"
            )


def train_clip(run: TrainCLIPArgs) -> Path:
    """Trains, writing checkpoints, the share of images matched to their caption, and sheets of what it finds."""
    run = overfit_config(run)
    with start_processes(run) as dist:
        return _train_clip(run, dist)


def _train_clip(run: TrainCLIPArgs, dist: Distributed) -> Path:
    out, device = run.directory("clip"), dist.device
    text = load_text_input(run.text_tokenizer)
    if text.vocab_size > run.model.text_vocab:
        raise ValueError(
            f"the text tokenizer has {text.vocab_size} ids, model.text_vocab is {run.model.text_vocab}; raise it"
        )
    pairs, held_out = (
        open_dataset(run.data, split, run.hard_negative_captions) for split in ("train", "held_out")
    )
    torch.manual_seed(run.seed)
    model = build_model("clip", run.model).to(device)
    links = {"text": text.to_dict(), "text_hash": text.hash, "data": pairs.hash}
    init = init_weights("clip", run, model, links)
    if run.compile:
        compile_layers(model)

    def pack(batch: tuple[Any, ...]) -> tuple[Tensor, ...]:
        pixels, ids, *broken = batch
        return pixels, model.pack_text(ids), *broken

    finish, finish_held_out = (
        CLIPBatch(text, run.seed, p if run.hard_negative_images else None) for p in (pairs, held_out)
    )
    count = min(run.eval_samples, held_out.size or run.eval_samples)
    chosen = first_samples(held_out, count)
    measured = tuple(tensor.to(device) for tensor in pack(finish_held_out(chosen)))
    captions = sample_captions(chosen, run.seed)
    # Listing 2 does not flip: captions speak of left and right
    task = StepOfPairs(
        pairs, run.train.batch_size, run.seed, "transformer", finish, dist.rank, dist.world_size
    )

    def evaluate(model: CLIP, step: int) -> dict[str, Any]:
        loss = CLIPObjective()(model, measured, step)
        return {
            "loss": loss.total,
            **loss.metrics,
            "retrieval": retrieval_grid(model, *measured[:2], captions),
        }

    with loader(task, run, out, pack) as batches:
        run_training("clip", run, dist, model, CLIPObjective(), batches, links, init, evaluate)
    if model.truncated:
        tqdm.write(
            f"note: {model.truncated} captions were longer than {run.model.text_len - 1} tokens and cut"
        )
    return out


@dataclass(frozen=True)
class CLIPBatch:
    """Pixels and text ids of a step, one caption drawn for each image."""

    text: TextTokenizer
    """Turns captions into ids."""
    seed: int
    """Of the drawing."""
    broken: CaptionedImages | None = None
    """The shapes, where beside each image stands one with a thing out of shape."""

    def __call__(self, batch: ImageTextBatch, step: int = 0) -> tuple[Any, ...]:
        """(B, 3, R, R), B lists of ids, and (B, 3, R, R) of broken images where they are asked for."""
        ids = [self.text.encode(caption) for caption in sample_captions(batch, self.seed)]
        pixels = torch.from_numpy(batch.pixels)
        if self.broken is None:
            return pixels, ids
        return (
            pixels,
            ids,
            torch.from_numpy(corrupted_images(self.broken, [index for _, index in batch.samples])),
        )


def main() -> None:
    """Command line of train_clip."""
    with cli_errors():
        train_clip(parse(TrainCLIPArgs, description=__doc__))

"""Train the dVAE on images (paper section 2.1): stage one.

python scripts/train_dvae.py                                        the shapes preset
python scripts/train_dvae.py --config configs/dvae/small.yaml --data.path my/images
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dalle.config import RESUME_FREE, cli_errors, parse
from dalle.data import DataConfig, StepOfPairs, first_samples, open_dataset
from dalle.dvae import DVAE, DVAEConfig, DVAELossConfig
from dalle.dvae.metrics import collapse_warning, dvae_scores
from dalle.dvae.objective import DVAEObjective
from dalle.hub.registry import build_model
from dalle.io.images import image_grid, to_pil
from dalle.io.rng import generator
from dalle.runs.args import TrainArgs
from dalle.runs.init_weights import init_weights, overfit_config
from dalle.runs.inputs import loader
from dalle.runs.training import run_training, start_processes
from dalle.schedules import Schedule
from dalle.train import TrainConfig
from dalle.train.config import NO_PLATEAU, EMAConfig, OptimizerConfig, Precision
from dalle.train.distributed import Distributed
from dalle.train.precision import compile_layers
from dalle.train.step import step_seed
from dalle.types import ImageTextBatch

PAPER_TRAINING = TrainConfig(
    batch_size=512,
    optimizer=OptimizerConfig(
        lr=Schedule(1e-4, 1.25e-6, 1_200_000),
        warmup_steps=0,
        plateau=NO_PLATEAU,
        beta2=0.999,
        weight_decay=1e-4,
        max_grad_norm=None,
        max_variance=None,
    ),
    ema=EMAConfig(decay=0.999, update_every=1),
)
"""A.2: batch 512, cosine learning rate, AdamW, averaging with 0.999 at each update."""


@dataclass(frozen=True)
class EncodeConfig:
    """How images become tokens once the dVAE is trained; read by encode_images."""

    images: int = 100_000
    """Images to encode, at most."""
    crops: int = 1
    """Random crops of each image (Listing 2); an endless set has none."""
    batch_size: int = 64
    """Images encoded at once."""
    precision: Precision = "fp32"
    """fp32, bf16, fp16, or auto: bf16 where the device has it in hardware. One code in a hundred differs."""
    shard: int = 8192
    """Images in a file of the cache; what a stop loses at most."""
    part: int | None = None
    """Which share of the files this process makes, from 0; torchrun's RANK unless given."""
    parts: int | None = None
    """Processes that share the work; torchrun's WORLD_SIZE unless given."""

    def __post_init__(self):
        for name in ("images", "crops", "batch_size", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainDVAEArgs(TrainArgs):
    """Trains the dVAE on images (stage one, paper section 2.1)."""

    steps: int = 3_000_000
    """Updates in all (A.2); schedules keep their own lengths."""
    data: DataConfig = DataConfig()
    """Images."""
    model: DVAEConfig = DVAEConfig()
    """Shape of the dVAE."""
    loss: DVAELossConfig = DVAELossConfig()
    """Schedules of the loss."""
    train: TrainConfig = PAPER_TRAINING
    """Optimizer, averaging, rhythm."""
    encode: EncodeConfig = field(default=EncodeConfig(), metadata=RESUME_FREE)
    """For encode_images."""
    crop: int | None = None
    """Train on random squares of this side, since the dVAE is fully convolutional; None takes whole images."""
    eval_samples: int = 64
    """Held-out images measured at each evaluation."""

    def __post_init__(self):
        super().__post_init__()
        if self.eval_samples < 1:
            raise ValueError(f"eval_samples must be positive, got {self.eval_samples}")
        if self.crop is not None and self.crop < self.model.downsample_factor:
            raise ValueError(
                f"crop must hold a token of {self.model.downsample_factor} pixels, got {self.crop}"
            )


def train_dvae(run: TrainDVAEArgs) -> Path:
    """Trains, writing checkpoints, log.jsonl and a sheet of reconstructions at each evaluation."""
    run = overfit_config(run)
    with start_processes(run) as dist:
        return _train_dvae(run, dist)


def _train_dvae(run: TrainDVAEArgs, dist: Distributed) -> Path:
    out, device, rank, world = run.directory("dvae"), dist.device, dist.rank, dist.world_size
    pairs, held_out = open_dataset(run.data), open_dataset(run.data, "held_out")
    torch.manual_seed(run.seed)
    model = build_model("dvae", run.model).to(device, memory_format=torch.channels_last)
    links = {"data": pairs.hash}
    init = init_weights("dvae", run, model, links)
    if run.compile:
        compile_layers(model)
    count = min(run.eval_samples, held_out.size or run.eval_samples)
    pixels = torch.from_numpy(first_samples(held_out, count).pixels)
    finish = DVAEBatch(run.crop, run.seed, rank, world)
    task = StepOfPairs(pairs, run.train.batch_size, run.seed, "dvae", finish, rank, world)  # Listing 1

    def evaluate(model: DVAE, step: int) -> dict[str, Any]:
        return evaluate_dvae(model, pixels.to(device), run.loss.tau(step))

    with loader(task, run, out) as batches:
        run_training("dvae", run, dist, model, DVAEObjective(run.loss), batches, links, init, evaluate)
    return out


@dataclass(frozen=True)
class DVAEBatch:
    """Pixels of a step: whole images, or a random square of each."""

    crop: int | None
    """Side of the square."""
    seed: int
    """Of the squares."""
    rank: int = 0
    """Which of the training processes."""
    world: int = 1
    """Of how many."""

    def __call__(self, batch: ImageTextBatch, step: int) -> Tensor:
        """(B, 3, H, W)."""
        pixels = torch.from_numpy(batch.pixels)
        if self.crop is None:
            return pixels
        return random_squares(pixels, self.crop, step_seed(self.seed, step), self.rank, self.world)


def random_squares(pixels: Tensor, side: int, seed: int, rank: int = 0, world: int = 1) -> Tensor:
    """A square of each image, anywhere: (B, 3, H, W) -> (B, 3, side, side).

    They are drawn for the images of all `world` processes, whose shares are equal, and those of `rank` taken: the
    same square of an image whatever the number of processes.
    """
    if side > min(pixels.shape[2:]):
        raise ValueError(f"crop {side} is larger than the images, {tuple(pixels.shape[2:])}; lower it")
    rng, own = generator("squares", seed), slice(rank * len(pixels), (rank + 1) * len(pixels))
    rows, columns = (
        rng.integers(free - side + 1, size=world * len(pixels))[own] for free in pixels.shape[2:]
    )
    squares = zip(pixels, rows, columns, strict=True)
    return torch.stack([image[:, y : y + side, x : x + side] for image, y, x in squares])


def evaluate_dvae(model: DVAE, pixels: Tensor, tau: float) -> dict[str, Any]:
    """Meters of held-out images; "reconstructions" shows original, soft and hard reconstruction side by side."""
    parts = [dvae_scores(model, part, tau) for part in pixels.split(64)]
    scores = {
        name: float(torch.stack([part[0][name].float() for part in parts]).mean()) for name in parts[0][0]
    }
    if sentence := collapse_warning(scores, model.vocab_size):
        tqdm.write(f"warning: {sentence}")
    rows = zip(*(to_pil(images[:8]) for images in (pixels, parts[0][1], parts[0][2])), strict=True)
    return scores | {
        "reconstructions": image_grid([list(row) for row in rows], scale=max(1, 128 // pixels.shape[-1]))
    }


def main() -> None:
    """Command line of train_dvae."""
    with cli_errors():
        train_dvae(parse(TrainDVAEArgs, preset="configs/dvae/shapes.yaml", description=__doc__))

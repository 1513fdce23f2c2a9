"""Train the dVAE on images (paper section 2.1): stage one.

python scripts/train_dvae.py                                        the shapes preset
python scripts/train_dvae.py --config configs/dvae/small.yaml --data.path my/images
"""

from dataclasses import field
from pathlib import Path

from dalle.config import RESUME_FREE, check_positive, cli_errors, configuration, parse
from dalle.data.config import DataConfig
from dalle.dvae.config import DVAEConfig, DVAELossConfig
from dalle.schedules import Schedule
from dalle.train.config import NO_PLATEAU, EMAConfig, OptimizerConfig, Precision, TrainArgs, TrainConfig

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


@configuration
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
        check_positive(self, "images", "crops", "batch_size", "shard")


@configuration
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
    """Train on random squares of this side (the dVAE is fully convolutional); None takes whole images."""
    eval_samples: int = 64
    """Held-out images measured at each evaluation."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "eval_samples")
        if self.crop is not None and self.crop < self.model.downsample_factor:
            raise ValueError(f"crop must be {self.model.downsample_factor} pixels or more, got {self.crop}")


def train_dvae(args: TrainDVAEArgs) -> Path:
    """Train; return the run's directory: checkpoints, log.jsonl, reconstructions of each evaluation."""
    import torch

    from dalle.data import first_samples, open_dataset
    from dalle.dvae.metrics import evaluate_dvae
    from dalle.dvae.objective import DVAEObjective
    from dalle.runs.batches import DVAEBatch
    from dalle.runs.training import TrainingRun, open_loader

    with TrainingRun("dvae", args) as run:
        args, dist = run.args, run.dist
        train_set, val_set = open_dataset(args.data), open_dataset(args.data, "val")
        run.build_model({"data": train_set.hash}, memory_format=torch.channels_last)
        count = min(args.eval_samples, val_set.size or args.eval_samples)
        val_images = torch.from_numpy(first_samples(val_set, count).pixels).to(dist.device)
        collate = DVAEBatch(args.crop, args.seed, dist.rank, dist.world_size)
        with open_loader("dvae", train_set, collate, run) as batches:  # augmented as in Listing 1
            return run.train(
                DVAEObjective(args.loss),
                batches,
                lambda model, step: evaluate_dvae(model, val_images, args.loss.tau(step)),
            )


def main() -> None:
    """Command line of train_dvae."""
    with cli_errors(parallel=True):
        train_dvae(parse(TrainDVAEArgs, preset="configs/dvae/shapes.yaml", description=__doc__))

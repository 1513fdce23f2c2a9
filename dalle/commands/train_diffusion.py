"""Train a diffusion model on images and captions, as GLIDE (Nichol et al. 2021): a base model, an upsampler
(model.low_resolution), or a fine-tuning of either for inpainting (model.inpainting, --init-from).

python scripts/train_diffusion.py --config configs/diffusion/shapes.yaml
python scripts/train_diffusion.py --config configs/diffusion/upsampler-shapes.yaml
python scripts/train_diffusion.py --config configs/diffusion/inpaint-shapes.yaml --init-from BASE --out DIR
"""

from dataclasses import field
from pathlib import Path

from dalle.config import RESUME_FREE, check_positive, cli_errors, configuration, parse
from dalle.data.config import DataConfig
from dalle.schedules import Schedule
from dalle.train.config import NO_PLATEAU, EMAConfig, OptimizerConfig, TrainArgs, TrainConfig
from dalle.unet.config import UNetConfig

DIFFUSION_TRAINING = TrainConfig(
    batch_size=2048,
    optimizer=OptimizerConfig(
        lr=Schedule(1.2e-4, 1.2e-4),
        warmup_steps=0,
        plateau=NO_PLATEAU,
        beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=None,
        max_variance=None,
    ),
    ema=EMAConfig(decay=0.9999, update_every=1),
)
"""GLIDE, section 4: batch 2048. The optimizer, not stated there, is that of unCLIP's decoder (Table 3), a
model of the same size."""


@configuration
class TrainDiffusionArgs(TrainArgs):
    """Trains a diffusion model: base, upsampler, or inpainting."""

    steps: int = 2_500_000
    """Updates in all (GLIDE, section 4: the base model)."""
    text_tokenizer: Path | None = field(default=None, metadata=RESUME_FREE)
    """Text tokenizer of a model of text; the newest under runs/ unless given."""
    data: DataConfig = DataConfig(resolution=64)
    """Images and captions, of the resolution of model.image_size."""
    class_names: tuple[str, ...] = ()
    """Captions of the classes, in the order of their labels, for a model with classes."""
    low_resolution: int = 64
    """Pixels on a side of the smaller image of an upsampler."""
    blurred: float = 0.5
    """Share of the smaller images that are blurred, as those of a base model are (Ho et al. 2021)."""
    model: UNetConfig = UNetConfig()
    """Shape of the U-Net and its diffusion."""
    train: TrainConfig = DIFFUSION_TRAINING
    """Optimizer, averaging, rhythm."""
    eval_samples: int = 64
    """Held-out images measured at each evaluation; the first eight are sampled."""
    eval_steps: int = field(default=25, metadata=RESUME_FREE)
    """Steps of the sampler that an evaluation measures."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "eval_samples", "low_resolution")
        side, model = self.data.resolution, self.model
        if side != model.image_size:
            raise ValueError(f"data.resolution {side} must be model.image_size {model.image_size}")
        if model.low_resolution and not self.low_resolution < side:
            raise ValueError(
                f"low_resolution must be below {side}, the side of the images, got {self.low_resolution}"
            )
        if not 0 <= self.blurred <= 1:
            raise ValueError(f"blurred must be in [0, 1], got {self.blurred}")
        if len(self.class_names) != (model.classes or 0):
            raise ValueError(
                f"class_names has {len(self.class_names)} names, model.classes is {model.classes}"
            )
        if model.text == "clip" or model.image_embedding:
            raise ValueError(
                "a U-Net of CLIP's embeddings (unCLIP) cannot be trained yet; set text to ids or none"
            )
        if not 2 <= self.eval_steps <= model.diffusion.steps:
            raise ValueError(f"eval_steps must be 2 to {model.diffusion.steps}, got {self.eval_steps}")


def train_diffusion(args: TrainDiffusionArgs) -> Path:
    """Train; return the run's directory: checkpoints, log.jsonl, samples of each evaluation."""
    import torch
    from tqdm import tqdm

    from dalle.data import first_samples, open_dataset, sample_captions
    from dalle.runs.batches import DiffusionBatch
    from dalle.runs.inputs import load_text_input
    from dalle.runs.training import TrainingRun, open_loader
    from dalle.train.step import to_device
    from dalle.unet.objective import DiffusionObjective
    from dalle.viz.sample_grids import evaluate_diffusion

    with TrainingRun(args.model.kind, args) as run:
        args, text, inputs = run.args, None, {}
        if args.model.text == "ids":
            text = load_text_input(args.text_tokenizer, args.model.text_vocab)
            inputs = {"text": text.to_dict(), "text_hash": text.hash}
        train_set, val_set = (open_dataset(args.data, split) for split in ("train", "val"))
        run.build_model(inputs | {"data": train_set.hash}, memory_format=torch.channels_last)
        objective, cut = DiffusionObjective(args.model), 0
        samples = first_samples(val_set, min(args.eval_samples, val_set.size or args.eval_samples))
        val_batch = to_device(DiffusionBatch(args, text, 0.0)(samples)[0], run.dist.device)
        captions = sample_captions(samples, args.seed)

        def receive(made):
            nonlocal cut
            batch, truncated = made
            cut += truncated
            return batch

        def evaluate(model, step: int):
            return evaluate_diffusion(model, objective, val_batch, captions, args.eval_steps)

        # augmented as in Listing 2, which does not flip: captions mention left and right
        collate = DiffusionBatch(args, text, args.model.diffusion.caption_dropout)
        with open_loader("transformer", train_set, collate, run, receive) as batches:
            run.train(objective, batches, evaluate)
        if cut:
            tqdm.write(f"note: {cut} captions were longer than {args.model.text_len} tokens and cut")
    return run.dir


def main() -> None:
    """Command line of train_diffusion."""
    with cli_errors(parallel=True):
        train_diffusion(parse(TrainDiffusionArgs, description=__doc__))

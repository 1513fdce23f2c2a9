"""Train a small CLIP on the same pairs, to rank images (paper section 2.6).

python scripts/train_clip.py --config configs/clip/shapes.yaml
"""

from dataclasses import field
from pathlib import Path

from dalle.clip.config import CLIPConfig
from dalle.config import RESUME_FREE, check_positive, cli_errors, configuration, parse
from dalle.data.config import DataConfig
from dalle.schedules import Schedule
from dalle.train.config import NO_PLATEAU, EMAConfig, OptimizerConfig, TrainArgs, TrainConfig

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


@configuration
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
    """Add to each image one with a misshapen object, which its caption must rank lower; shapes only."""
    model: CLIPConfig = CLIPConfig()
    """Shape of both towers."""
    train: TrainConfig = CLIP_TRAINING
    """Optimizer, averaging, rhythm."""
    eval_samples: int = 128
    """Held-out pairs measured at each evaluation."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "eval_samples")
        if self.train.grad_accum_steps > 1:
            raise ValueError(
                "train.grad_accum_steps changes CLIP's loss, which compares every caption with every image "
                "of the batch; set it to 1, and lower train.batch_size or start more processes to save memory"
            )


def train_clip(args: TrainCLIPArgs) -> Path:
    """Train; return the run's directory: checkpoints, retrieval accuracy in log.jsonl, retrieval grids."""
    from tqdm import tqdm

    from dalle.clip.objective import CLIPObjective
    from dalle.data import first_samples, open_dataset, sample_captions
    from dalle.runs.batches import CLIPBatch
    from dalle.runs.inputs import load_text_input
    from dalle.runs.training import TrainingRun, open_loader
    from dalle.viz.sample_grids import retrieval_grid

    with TrainingRun("clip", args) as run:
        args, dist = run.args, run.dist
        text = load_text_input(args.text_tokenizer, args.model.text_vocab)
        train_set, val_set = (
            open_dataset(args.data, split, args.hard_negative_captions) for split in ("train", "val")
        )
        inputs = {"text": text.to_dict(), "text_hash": text.hash, "data": train_set.hash}
        model = run.build_model(inputs)

        def pack(batch):
            pixels, ids, *negatives = batch
            return pixels, model.pack_text(ids), *negatives

        collate, collate_val = (
            CLIPBatch(text, args.seed, dataset if args.hard_negative_images else None)
            for dataset in (train_set, val_set)
        )
        samples = first_samples(val_set, min(args.eval_samples, val_set.size or args.eval_samples))
        val_batch = tuple(tensor.to(dist.device) for tensor in pack(collate_val(samples)))
        captions = sample_captions(samples, args.seed)

        def evaluate(model, step: int):
            loss = CLIPObjective()(model, val_batch, step)
            grid = retrieval_grid(model, *val_batch[:2], captions)
            return {"loss": loss.total, **loss.metrics, "retrieval": grid}

        # augmented as in Listing 2, which does not flip: captions mention left and right
        with open_loader("transformer", train_set, collate, run, pack) as batches:
            run.train(CLIPObjective(), batches, evaluate)
        if model.truncated:
            limit = args.model.text_len - 1
            tqdm.write(f"note: {model.truncated} captions were longer than {limit} tokens and cut")
    return run.dir


def main() -> None:
    """Command line of train_clip."""
    with cli_errors(parallel=True):
        train_clip(parse(TrainCLIPArgs, description=__doc__))

"""The reranker: a small CLIP trained on the same pairs (paper section 2.6; Radford et al. 2021)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dalle.clip import CLIP, CLIPConfig
from dalle.data import PairsConfig, open_pairs, pixels_of_samples
from dalle.data.order import samples_of_step
from dalle.data.shapes_broken import broken_pictures
from dalle.models import build, describe
from dalle.objectives import CLIPObjective
from dalle.rng import generator
from dalle.stages.runs import TrainingRun, take_text
from dalle.text import TextTokenizer
from dalle.train import Schedule, TrainConfig, fit
from dalle.train.ema import EMAConfig
from dalle.train.optim import OptimizerConfig
from dalle.train.precision import compile_parts, resolve_device
from dalle.types import Pairs

CLIP_TRAINING = TrainConfig(
    batch_size=32_768,
    optimizer=OptimizerConfig(
        lr=Schedule(5e-4, 0.0, 390_000), warmup=2_000, beta2=0.98, eps=1e-6, weight_decay=0.2, clip=None
    ),
    ema=EMAConfig(decay=0.99, every=25),
)
"""Radford et al., Tables 18 and 20: batch 32,768, 32 epochs of 400M pairs, cosine step size."""


@dataclass(frozen=True)
class CLIPRun(TrainingRun):
    """Trains a CLIP to rank pictures by their caption."""

    steps: int = 390_000
    """Updates in all (Radford et al.: 32 epochs)."""
    tokenizer: Path | None = None
    """Text tokenizer; the newest under runs/ unless given."""
    data: PairsConfig = PairsConfig()
    """Pictures and captions."""
    siblings: bool = False
    """Every second pair differs from the one before in one attribute; shapes only."""
    broken: bool = False
    """Beside each picture stands one with a thing out of shape, which its caption must not prefer; shapes only."""
    model: CLIPConfig = CLIPConfig()
    """Shape of both towers."""
    objective: CLIPObjective = CLIPObjective()
    """The loss; nothing to set."""
    train: TrainConfig = CLIP_TRAINING
    """Optimizer, averaging, rhythm."""
    eval_pictures: int = 128
    """Held-out pairs measured at each evaluation."""

    def __post_init__(self):
        super().__post_init__()
        if self.eval_pictures < 1:
            raise ValueError(f"eval_pictures must be positive, got {self.eval_pictures}")


def train_clip(run: CLIPRun) -> Path:
    """Trains, writing checkpoints and log.jsonl with the share of pictures matched to their caption."""
    out = run.directory("clip")
    device = resolve_device(run.device)
    text = take_text(run.tokenizer)
    if text.vocab_size > run.model.text_vocab:
        raise ValueError(
            f"the text tokenizer has {text.vocab_size} ids, model.text_vocab is {run.model.text_vocab}; raise it"
        )
    pairs, held_out = (open_pairs(run.data, split, run.siblings) for split in ("train", "held_out"))
    torch.manual_seed(run.seed)
    model = build("clip", run.model).to(device)
    if run.compile:
        compile_parts(model)

    def batch_of(pairs: Pairs, samples: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        batch = pairs_batch(pairs, samples, model, text, run.seed)
        if not run.broken:
            return batch
        return *batch, torch.from_numpy(broken_pictures(pairs, [index for _, index in samples]))

    def batches(step: int) -> tuple[Tensor, ...]:
        return batch_of(pairs, list(samples_of_step(step, run.train.batch_size, pairs.size, run.seed)))

    count = min(run.eval_pictures, held_out.size or run.eval_pictures)
    measured = tuple(tensor.to(device) for tensor in batch_of(held_out, [(0, i) for i in range(count)]))

    def evaluate(model: CLIP, step: int) -> dict[str, float]:
        loss = run.objective(model, measured, step)
        return {"loss": float(loss.total), **{name: float(value) for name, value in loss.metrics.items()}}

    links = {"text": text.to_dict(), "text_hash": text.hash, "data": pairs.hash}
    fit(
        model, run.objective, batches, run.train, steps=run.steps, seed=run.seed, run_dir=out,
        meta=describe("clip", model, run.record(), links),
        evaluate=evaluate, resume=run.resume,
    )  # fmt: skip
    if model.truncated:
        tqdm.write(f"note: {model.truncated} captions were longer than {run.model.text_len - 1} tokens and cut")
    return out


def pairs_batch(
    pairs: Pairs, samples: list[tuple[int, int]], model: CLIP, text: TextTokenizer, seed: int
) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, R, R) and packed text (B, L) of (epoch, index) samples, one caption drawn for each."""
    indices = [index for _, index in samples]
    pixels = pixels_of_samples(pairs, samples, "transformer", seed)  # no flips: captions speak of left and right
    chosen = []
    for (epoch, index), captions in zip(samples, pairs.captions(indices), strict=True):
        rng = generator("caption", seed, epoch, index)
        chosen.append(text.encode(captions[rng.integers(len(captions))]))
    return pixels, model.pack_text(chosen)

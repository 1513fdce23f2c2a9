"""Train the transformer on a token cache (paper section 2.2): stage two.

python scripts/train_transformer.py                                 the shapes preset, earlier stages made first
python scripts/train_transformer.py --config configs/transformer/small.yaml --tokens runs/tokens
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dalle.commands.encode_images import take_image_tokenizer
from dalle.config import RESUME_FREE, cli_errors, parse
from dalle.data import DataConfig, TokenCache
from dalle.data.sampler import batch_indices
from dalle.hub.registry import build_model
from dalle.io.rng import generator
from dalle.layout import TokenLayout
from dalle.runs.args import TrainArgs
from dalle.runs.init_weights import init_weights, overfit_config
from dalle.runs.inputs import load_text_input, resolve_input
from dalle.runs.training import run_training, start_processes
from dalle.text import BPETokenizer, TextTokenizerConfig
from dalle.train import TrainConfig
from dalle.train.distributed import Distributed
from dalle.train.precision import compile_layers
from dalle.transformer import TransformerConfig
from dalle.transformer.config import TransformerLossConfig
from dalle.transformer.objective import TransformerObjective
from dalle.types import ImageTokenizer
from dalle.viz.sample_grids import SampleGrid


@dataclass(frozen=True)
class TrainTransformerArgs(TrainArgs):
    """Trains the transformer on a token cache (stage two, paper section 2.2)."""

    tokens: Path | None = field(default=None, metadata=RESUME_FREE)
    """Token cache; the newest under runs/ unless given."""
    text_tokenizer: Path | None = field(default=None, metadata=RESUME_FREE)
    """Text tokenizer; the newest under runs/ unless given. A Hugging Face tokenizer.json or a youtokentome model
    is read too."""
    dvae: Path | None = field(default=None, metadata=RESUME_FREE)
    """The dVAE that the tokens must be of; given, a cache of another one is refused, and each evaluation draws."""
    data: DataConfig = DataConfig()
    """Captions; read by train_tokenizer only."""
    text: TextTokenizerConfig = TextTokenizerConfig()
    """The vocabulary; read by train_tokenizer only."""
    model: TransformerConfig = TransformerConfig()
    """Shape of the transformer."""
    loss: TransformerLossConfig = TransformerLossConfig()
    """Weights of the loss."""
    train: TrainConfig = TrainConfig()
    """Optimizer, averaging, rhythm."""
    bpe_dropout: float = 0.1
    """Share of merges skipped at random while training (B.2)."""
    caption_dropout: float = 0.0
    """Share of captions emptied while training, for classifier-free guidance (not in the paper)."""
    eval_samples: int = 256
    """Images at the end of the cache kept for evaluation."""
    sample_grid_size: int = 8
    """Held-out captions drawn at each evaluation into <out>/samples-STEP.png, with --dvae; 0 draws none, nor do
    fsdp and hsdp."""

    def __post_init__(self):
        super().__post_init__()
        if self.eval_samples < 1:
            raise ValueError(f"eval_samples must be positive, got {self.eval_samples}")
        if self.sample_grid_size < 0:
            raise ValueError(f"sample_grid_size cannot be negative, got {self.sample_grid_size}")
        for name in ("bpe_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")


class TokenBatches:
    """Joint ids of a step: a caption of each image, encoded with dropout, and its image tokens.

    Which caption and which merges are skipped depends on (seed, epoch, image) alone. `truncated`
    counts captions that were cut. Of `world` processes each takes its share of the step: joined in the order of
    `rank` they are the step of one.
    """

    def __init__(
        self,
        cache: TokenCache,
        text: BPETokenizer,
        layout: TokenLayout,
        run: TrainTransformerArgs,
        rank: int = 0,
        world: int = 1,
    ):
        self.cache, self.text, self.layout, self.run = cache, text, layout, run
        self.rank, self.world = rank, world
        self.trained = cache.size - run.eval_samples
        self.truncated = 0

    def __call__(self, step: int) -> Tensor:
        """int64 (B / world, N). A sample is one crop of one image: all images in one crop, then all in the next."""
        size = self.cache.crops * self.trained
        drawn = batch_indices(step, self.run.train.batch_size, size, self.run.seed, self.rank, self.world)
        samples = [(epoch, *divmod(sample, self.trained)) for epoch, sample in drawn]
        _, crops, images = zip(*samples, strict=True)
        captions = [
            self._caption(epoch, crop * self.cache.size + image, texts)
            for (epoch, crop, image), texts in zip(samples, self.cache.captions(images), strict=True)
        ]
        return self._pack(captions, images, crops)

    def held_out(self) -> Tensor:
        """The last images, in their first crop, first caption each, without dropout."""
        images = range(self.trained, self.cache.size)
        return self._pack([self.text.encode(texts[0]) for texts in self.cache.captions(images)], images)

    def captions(self, count: int) -> list[str]:
        """The first captions of the first held-out images."""
        images = range(self.trained, min(self.trained + count, self.cache.size))
        return [texts[0] for texts in self.cache.captions(images)]

    def _pack(
        self, captions: list[list[int]], images: Sequence[int], crops: Sequence[int] | None = None
    ) -> Tensor:
        self.truncated += sum(len(ids) > self.layout.max_caption_len for ids in captions)
        text_tokens = self.layout.pad_text(captions, truncate=True)
        return self.layout.pack(text_tokens, self.cache.image_tokens(images, crops))

    def _caption(self, epoch: int, row: int, captions: list[str]) -> list[int]:
        """One of an image's captions as ids; every crop of the image is a row of its own."""
        rng = generator("caption", self.run.seed, epoch, row)
        if rng.random() < self.run.caption_dropout:
            return []
        caption = captions[rng.integers(len(captions))]
        return self.text.encode(caption, self.run.bpe_dropout, (self.run.seed, epoch, row))


def train_transformer(run: TrainTransformerArgs) -> Path:
    """Trains, writing checkpoints and log.jsonl with nats per text and per image token, and drawings if asked."""
    run = overfit_config(run)
    with start_processes(run) as dist:
        return _train_transformer(run, dist)


def _train_transformer(run: TrainTransformerArgs, dist: Distributed) -> Path:
    out, device = run.directory("transformer"), dist.device
    text, cache = load_text_input(run.text_tokenizer), TokenCache(resolve_input("tokens", run.tokens))
    image_tokenizer = check_inputs(run, text, cache, device)
    torch.manual_seed(run.seed)
    model = build_model("transformer", run.model).to(device)
    links = {"text": text.to_dict(), "text_hash": text.hash, "dvae": cache.meta["dvae"], "tokens": cache.hash}
    init = init_weights("transformer", run, model, links)
    # `backends` refuses, before any work, what cannot run
    print("attention: " + ", ".join(f"{kind} by {backend}" for kind, backend in model.backends().items()))
    if run.compile:
        compile_layers(model)
    batches = TokenBatches(cache, text, model.layout, run, dist.rank, dist.world_size)
    held_out = batches.held_out().split(run.train.batch_size)
    drawn = (
        run.sample_grid_size if image_tokenizer and not dist.sharded else 0
    )  # a step of drawing needs whole weights
    captions = batches.captions(drawn)
    draw = SampleGrid(image_tokenizer, text, captions, run.seed) if captions else None

    def evaluate(model, step: int) -> dict[str, Any]:
        losses = [TransformerObjective(run.loss)(model, ids.to(device), step) for ids in held_out]
        weights = torch.tensor([len(ids) for ids in held_out]) / run.eval_samples
        named = {"loss": [loss.total for loss in losses]}
        named |= {name: [loss.metrics[name] for loss in losses] for name in losses[0].metrics}
        scores = {name: float(torch.stack(values).cpu() @ weights) for name, values in named.items()}
        return scores | ({"samples": draw(model)} if draw else {})

    run_training(
        "transformer", run, dist, model, TransformerObjective(run.loss), batches, links, init, evaluate
    )
    if batches.truncated:
        tqdm.write(
            f"note: {batches.truncated} captions were longer than {model.layout.max_caption_len} tokens and cut"
        )
    return out


def check_inputs(
    run: TrainTransformerArgs, text: BPETokenizer, cache: TokenCache, device: torch.device
) -> ImageTokenizer | None:
    """ValueError, before the first step, for parts that do not fit the model's shape; the dVAE, if one is given."""
    model = run.model
    tokenizer, weights = take_image_tokenizer(run.dvae, device) if run.dvae else (None, cache.meta["dvae"])
    if weights != cache.meta["dvae"]:
        raise ValueError(
            f"{cache.folder} holds tokens of dVAE {cache.meta['dvae']}, {run.dvae} is {weights}: "
            "they do not belong together; encode the images again"
        )
    if cache.grid != model.grid:
        raise ValueError(
            f"{cache.folder} has a grid of {list(cache.grid)}, model.grid is {list(model.grid)}; set it"
        )
    if cache.meta["vocab"] != model.image_vocab:
        raise ValueError(
            f"{cache.folder} has {cache.meta['vocab']} codes, model.image_vocab is {model.image_vocab}; set it"
        )
    if text.vocab_size > model.text_vocab:
        raise ValueError(
            f"the text tokenizer has {text.vocab_size} ids, model.text_vocab is {model.text_vocab}; raise it"
        )
    if cache.size <= run.eval_samples:
        raise ValueError(
            f"{cache.folder} has {cache.size} images, eval_samples takes {run.eval_samples}; lower it"
        )
    return tokenizer


def main() -> None:
    """Command line of train_transformer; without any argument, missing earlier stages run first."""
    with cli_errors():
        args = parse(TrainTransformerArgs, preset="configs/transformer/shapes.yaml", description=__doc__)
        if len(sys.argv) == 1:
            from dalle.commands.quickstart import make_missing_stages

            make_missing_stages()
        train_transformer(args)

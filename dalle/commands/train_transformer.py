"""Train the transformer on a token cache (paper section 2.2): stage two.

python scripts/train_transformer.py                      the shapes preset, after missing earlier stages
python scripts/train_transformer.py --config configs/transformer/small.yaml --tokens runs/tokens
"""

import sys
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

from dalle.config import RESUME_FREE, check_positive, cli_errors, configuration, parse
from dalle.data.config import DataConfig
from dalle.text.tokenizer import TextTokenizerConfig
from dalle.train.config import TrainArgs, TrainConfig
from dalle.transformer.config import TransformerConfig, TransformerLossConfig

if TYPE_CHECKING:
    from dalle.data.token_cache import TokenCache


@configuration
class TrainTransformerArgs(TrainArgs):
    """Trains the transformer on a token cache (stage two, paper section 2.2)."""

    tokens: Path | None = field(default=None, metadata=RESUME_FREE)
    """Token cache; the newest under runs/ unless given."""
    text_tokenizer: Path | None = field(default=None, metadata=RESUME_FREE)
    """Text tokenizer, also a Hugging Face tokenizer.json or a youtokentome one; default: newest in runs/."""
    dvae: Path | None = field(default=None, metadata=RESUME_FREE)
    """The dVAE of the tokens: checked against the cache, and used for a sample grid at each evaluation."""
    data: DataConfig = DataConfig()
    """Workers and prefetch; the rest is read by train_tokenizer only."""
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
    """Held-out captions in <out>/samples-STEP.png, with --dvae; 0 for none; not with fsdp and hsdp."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "eval_samples")
        if self.sample_grid_size < 0:
            raise ValueError(f"sample_grid_size cannot be negative, got {self.sample_grid_size}")
        for name in ("bpe_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")


def train_transformer(args: TrainTransformerArgs) -> Path:
    """Train; return the run's directory: checkpoints, losses per text and image token, sample grids."""
    import torch
    from tqdm import tqdm

    from dalle.data.token_cache import TokenCache
    from dalle.runs.batches import TokenBatches, TokenLoader
    from dalle.runs.inputs import load_dvae_input, load_text_input, resolve_input
    from dalle.runs.training import TrainingRun
    from dalle.transformer.objective import TransformerObjective
    from dalle.viz.sample_grids import SampleGrid

    with TrainingRun("transformer", args) as run:
        args, dist = run.args, run.dist
        text = load_text_input(args.text_tokenizer, args.model.text_vocab)
        cache = TokenCache(resolve_input("tokens", args.tokens))
        image_tokenizer, dvae_hash = None, cache.meta["dvae"]
        if args.dvae:
            image_tokenizer, dvae_hash = load_dvae_input(args.dvae, dist.device)
        check_cache(args, cache, dvae_hash)
        inputs = {"text": text.to_dict(), "text_hash": text.hash, "dvae": dvae_hash, "tokens": cache.hash}
        model = run.build_model(inputs)
        # backends() refuses, before any work, what this device cannot run
        print("attention: " + ", ".join(f"{kind} by {backend}" for kind, backend in model.backends().items()))
        batches = TokenBatches(cache, text, model.layout, args, dist.rank, dist.world_size)
        val_batches = batches.val_batches()
        captions = batches.val_captions(args.sample_grid_size)
        sample_grid = None
        if image_tokenizer and captions and not dist.sharded:  # sampling needs whole weights
            sample_grid = SampleGrid(image_tokenizer, text, captions, args.seed)
        objective = TransformerObjective(args.loss)

        def evaluate(model, step: int):
            losses = [objective(model, ids.to(dist.device), step) for ids in val_batches]
            weights = torch.tensor([len(ids) for ids in val_batches]) / args.eval_samples
            values = {"loss": [loss.total for loss in losses]}
            values |= {name: [loss.metrics[name] for loss in losses] for name in losses[0].metrics}
            scores = {name: float((torch.stack(each).cpu() * weights).sum()) for name, each in values.items()}
            return scores | ({"samples": sample_grid(model)} if sample_grid else {})

        with TokenLoader(batches, pin=dist.device.type == "cuda") as loader:
            run.train(objective, loader, evaluate)
        if loader.truncated:
            limit = model.layout.max_caption_len
            tqdm.write(f"note: {loader.truncated} captions were longer than {limit} tokens and cut")
    return run.dir


def check_cache(run: TrainTransformerArgs, cache: "TokenCache", dvae_hash: str) -> None:
    """ValueError for a token cache that does not fit the model or the dVAE."""
    model, folder = run.model, cache.folder
    dvae, vocab = cache.meta["dvae"], cache.meta["vocab"]
    if dvae_hash != dvae:
        raise ValueError(
            f"{folder} holds tokens of dVAE {dvae}, {run.dvae} is {dvae_hash}: they do not belong together; "
            "encode the images again"
        )
    if cache.grid != model.grid:
        raise ValueError(f"{folder} has grid {list(cache.grid)}, model.grid is {list(model.grid)}; set it")
    if vocab != model.image_vocab:
        raise ValueError(f"{folder} has {vocab} codes, model.image_vocab is {model.image_vocab}; set it")
    if cache.size <= run.eval_samples:
        raise ValueError(f"{folder} has {cache.size} images, eval_samples takes {run.eval_samples}; lower it")


def main() -> None:
    """Command line of train_transformer; without any argument, missing earlier stages run first."""
    with cli_errors(parallel=True):
        args = parse(TrainTransformerArgs, preset="configs/transformer/shapes.yaml", description=__doc__)
        if len(sys.argv) == 1:
            from dalle.runs.quickstart import make_missing_stages

            make_missing_stages()
        train_transformer(args)

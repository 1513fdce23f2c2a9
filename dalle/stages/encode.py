"""Between the stages: pictures become tokens once (paper section 2.2: argmax, no noise)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dalle.config import to_dict
from dalle.data import PairsConfig, TokenCache, open_pairs, pixels_of_samples
from dalle.data.tokens import write_tokens
from dalle.stages.dvae import EncodeConfig
from dalle.stages.runs import ROOT, take_part
from dalle.train.precision import autocast, resolve_device, resolve_precision
from dalle.train.state import make_directory


@dataclass(frozen=True)
class EncodeRun:
    """Encodes pictures with a trained dVAE into a token cache for the transformer."""

    out: Path | None = None
    """Directory of the cache; runs/tokens unless given."""
    dvae: Path | None = None
    """Run, checkpoint or model directory of the dVAE; the newest under runs/ unless given."""
    seed: int = 0
    """Of the random crops."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""
    data: PairsConfig = PairsConfig()
    """Pictures and captions."""
    encode: EncodeConfig = EncodeConfig()
    """How many, how often."""


def encode_images(run: EncodeRun) -> TokenCache:
    """Writes the cache; it takes its name only when it is whole."""
    out = run.out or ROOT / "tokens"
    make_directory(out.parent)
    device = resolve_device(run.device)
    precision = resolve_precision(run.encode.precision, device)
    part = take_part("dvae", run.dvae, device)
    part.model.to(memory_format=torch.channels_last)
    pairs = open_pairs(run.data)
    pictures = run.encode.pictures if pairs.size is None else min(run.encode.pictures, pairs.size)
    crops = 1 if pairs.size is None else run.encode.crops
    side = run.data.resolution // part.model.downsampling
    meta = {
        "grid": [side, side],
        "vocab": part.model.vocab_size,
        "dvae": part.hash,
        "data": to_dict(run.data),
        "crops": crops,
        "precision": precision,
    }

    def encode(numbers: list[int]) -> tuple[Tensor, list[list[str]]]:
        samples = [divmod(number, pictures) for number in numbers]  # (which crop, index)
        pixels = pixels_of_samples(pairs, samples, "transformer", run.seed)
        with autocast(precision, device):
            tokens = part.model.encode(pixels.to(device, memory_format=torch.channels_last))
        return tokens, pairs.captions([index for _, index in samples])

    batches = _batches(pictures * crops, run.encode.batch_size)
    cache = write_tokens(out, encode, batches, pictures * crops, meta)
    print(f"{out}: {cache.size} pictures of {side} x {side} tokens")
    return cache


def _batches(count: int, size: int) -> Iterator[list[int]]:
    with tqdm(total=count, desc="tokens", unit="picture", disable=None) as bar:
        for start in range(0, count, size):
            numbers = list(range(start, min(start + size, count)))
            yield numbers
            bar.update(len(numbers))

"""Turn images into tokens with a trained dVAE (paper section 2.2), once, before stage two.

python scripts/encode_images.py --config configs/dvae/shapes.yaml
python scripts/encode_images.py --config configs/dvae/small.yaml --data.path my/images --dvae runs/dvae
torchrun --nproc-per-node 8 scripts/encode_images.py ...            eight processes share the work; so does
python scripts/encode_images.py ... --encode.part 0 --encode.parts 8     each of eight such commands
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle.commands.train_dvae import EncodeConfig, TrainDVAEArgs
from dalle.config import cli_errors, parse, resume_fingerprint
from dalle.data import DataConfig, Loader, TokenCache, open_dataset
from dalle.data.bad_samples import BadSampleLog
from dalle.data.dataloader import worker_count
from dalle.data.token_cache import TokenCacheSpec
from dalle.data.token_writer import TokenWriter
from dalle.io.files import make_directory
from dalle.runs.args import ROOT
from dalle.runs.inputs import load_stage
from dalle.train.precision import autocast, resolve_device, resolve_precision
from dalle.types import CaptionedImages, ImageTextBatch, ImageTokenizer, check_tokens

TRANSFORM = 2
"""Raised when a crop or a resize becomes another, so that tokens of before are not taken for those of after."""


@dataclass(frozen=True)
class EncodeImagesArgs:
    """Encodes images with a trained dVAE into a token cache for the transformer."""

    out: Path | None = None
    """Directory of the cache; runs/tokens unless given. An encoding that stopped there goes on."""
    dvae: Path | None = None
    """Run, checkpoint or model directory of the dVAE; the newest under runs/ unless given. Also a published image
    tokenizer: the folder of OpenAI's encoder.pkl and decoder.pkl, or one file of another (dalle/pretrained/load.py)."""
    seed: int = 0
    """Of the random crops."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""
    data: DataConfig = DataConfig()
    """Images and captions."""
    encode: EncodeConfig = EncodeConfig()
    """How many, how often, which share of the work."""


def encode_images(run: EncodeImagesArgs) -> TokenCache | None:
    """Encodes this process's shards. The cache, or None while the shards of other parts are missing."""
    out = run.out or ROOT / "tokens"
    make_directory(out.parent)
    part, parts = turn(run.encode)
    device = _device(run.device)
    tokenizer, weights = take_image_tokenizer(run.dvae, device)
    pairs = open_dataset(run.data)
    encoder = Encoder(tokenizer, pairs, run, device)
    writer = TokenWriter(out, encoder.plan(weights, pairs.hash), part, parts)
    log = out / (f"skipped-{part}.jsonl" if parts > 1 else "skipped.jsonl")
    skipped = BadSampleLog(log, pairs.size, getattr(pairs, "skipped", ()), run.data.max_bad_fraction)
    for shard, found in encoder.shards(writer, skipped):
        writer.write(shard, *found)
    cache = writer.finish()
    _tell(out, cache, f"part {part} of {parts}", skipped)
    return cache


def take_image_tokenizer(given: Path | None, device: torch.device) -> tuple[ImageTokenizer, str]:
    """What --dvae names, and the hash of its weights: the one door for readers of other files."""
    part = load_stage("dvae", given, device)
    return part.model.to(memory_format=torch.channels_last), part.hash


@dataclass(frozen=True)
class CropsOfShards:
    """What a worker reads: step i is one crop of one batch of one shard. Steps go on from shard to shard."""

    pairs: CaptionedImages
    """The images."""
    plan: TokenCacheSpec
    """Which of them are in a shard, and how many crops there are."""
    shards: tuple[int, ...]
    """Those to read, ascending."""
    batch_size: int
    """Images in a step."""
    seed: int
    """Of the crops."""

    def __len__(self) -> int:
        images = len(self.plan.numbers(self.shards[-1])) if self.shards else 0  # the last may be a short one
        return max(0, len(self.shards) - 1) * self._steps(self.plan.shard) + self._steps(images)

    def _steps(self, images: int) -> int:
        return -(-images // self.batch_size) * self.plan.crops

    def batches(self, shard: int) -> list[range]:
        """The images of a shard, batch by batch."""
        numbers = self.plan.numbers(shard)
        return [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]

    def __call__(self, step: int) -> ImageTextBatch:
        place, within = divmod(step, self._steps(self.plan.shard))
        batch, crop = divmod(within, self.plan.crops)
        samples = [(crop, number) for number in self.batches(self.shards[place])[batch]]
        return self.pairs.load(samples, "transformer", self.seed)


class Encoder:
    """Turns images into tokens with any image tokenizer."""

    def __init__(
        self, tokenizer: ImageTokenizer, pairs: CaptionedImages, run: EncodeImagesArgs, device: torch.device
    ):
        self.tokenizer, self.pairs, self.run, self.device = tokenizer, pairs, run, device
        self.precision = resolve_precision(run.encode.precision, device)
        self.crops = 1 if pairs.size is None else run.encode.crops
        if run.data.resolution % tokenizer.downsample_factor:
            raise ValueError(
                f"data.resolution {run.data.resolution} is no multiple of {tokenizer.downsample_factor}, "
                "the pixels on a side of a token; change it"
            )
        self.side = run.data.resolution // tokenizer.downsample_factor

    def plan(self, weights: str, data: str) -> TokenCacheSpec:
        """What the tokens depend on, all of it."""
        config = self.run.encode
        settings = resume_fingerprint(self.run.data)
        for name in ("path", "image_root", "val_path"):
            settings.pop(name)  # which images they are says the hash; they may lie elsewhere
        transform = {"listing": 2, "version": TRANSFORM, "seed": self.run.seed, "precision": self.precision}
        transform["data"] = settings
        images = config.images if self.pairs.size is None else min(config.images, self.pairs.size)
        return TokenCacheSpec(
            dvae=weights,
            data=data,
            grid=(self.side, self.side),
            vocab=self.tokenizer.vocab_size,
            images=images,
            crops=self.crops,
            shard=config.shard,
            transform=transform,
        )

    def shards(self, writer: TokenWriter, skipped: BadSampleLog) -> Iterator[tuple[int, tuple]]:
        """(shard, what `TokenWriter.write` takes) of each that is missing, read ahead by workers."""
        missing = writer.missing()
        task = CropsOfShards(
            self.pairs, writer.plan, tuple(missing), self.run.encode.batch_size, self.run.seed
        )
        done = sorted(set(writer.own()) - set(missing))
        counts = [sum(len(writer.plan.numbers(shard)) for shard in part) for part in (done, writer.own())]
        seen, step = counts[0], 0
        data = self.run.data
        with (
            tqdm(total=counts[1], initial=seen, desc="tokens", unit="image", disable=None) as bar,
            Loader(task, len(task), worker_count(data.workers, self.pairs.size), data.prefetch) as load,
        ):
            for shard in missing:
                found = Images(self.crops, self.side**2)
                for numbers in task.batches(shard):
                    seen += len(numbers)
                    for crop in range(self.crops):
                        batch = load(step)
                        found.add(batch, crop, self._encode(batch))
                        skipped.add(batch.skipped, len(done) + step, seen)
                        step += 1
                    bar.update(len(numbers))
                yield shard, found.whole()

    def _encode(self, batch: ImageTextBatch) -> Tensor:
        """int64 (b, rows * columns)."""
        if not batch.samples:
            return torch.zeros(0, self.side**2, dtype=torch.int64)
        pixels = torch.from_numpy(batch.pixels).to(self.device, memory_format=torch.channels_last)
        with torch.inference_mode(), autocast(self.precision, self.device):
            tokens = self.tokenizer.encode(pixels)
        if tokens.shape != (len(pixels), self.side**2):
            raise ValueError(
                f"the image tokenizer gave {tuple(tokens.shape)} tokens, expected {(len(pixels), self.side**2)}"
            )
        check_tokens(tokens, self.tokenizer.vocab_size, "image tokens")
        return tokens.cpu()


class Images:
    """Tokens and captions of a shard's images, crop by crop as they come."""

    def __init__(self, crops: int, length: int):
        self.crops, self.length = crops, length
        self._tokens: dict[int, dict[int, np.ndarray]] = {}
        self._captions: dict[int, list[str]] = {}

    def add(self, batch: ImageTextBatch, crop: int, tokens: Tensor) -> None:
        """One crop of some images."""
        for (_, number), row, captions in zip(
            batch.samples, tokens.numpy().astype(np.uint16), batch.captions, strict=True
        ):
            self._tokens.setdefault(number, {})[crop] = row
            self._captions[number] = captions

    def whole(self) -> tuple[np.ndarray, list[int], list[list[str]]]:
        """Tokens uint16 (n, crops, length), numbers and captions of the images of which every crop could be read."""
        numbers = [number for number in sorted(self._tokens) if len(self._tokens[number]) == self.crops]
        tokens = np.empty((len(numbers), self.crops, self.length), np.uint16)
        for place, number in enumerate(numbers):
            for crop, row in self._tokens[number].items():
                tokens[place, crop] = row
        return tokens, numbers, [self._captions[number] for number in numbers]


def turn(config: EncodeConfig) -> tuple[int, int]:
    """(part, parts) of this process: as set, else torchrun's RANK and WORLD_SIZE, else all of it."""
    if (config.part is None) != (config.parts is None):
        raise ValueError("give both --encode.part and --encode.parts, or neither")
    if config.part is not None:
        return config.part, config.parts
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _device(name: str) -> torch.device:
    """The device; under torchrun each process takes the GPU of its own number."""
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def _tell(out: Path, cache: TokenCache | None, part: str, skipped: BadSampleLog) -> None:
    if skipped.counts:
        print(f"note: {skipped}")
    if cache is None:
        print(f"{out}: {part} is done; the cache is whole when all parts are")
        return
    rows, columns = cache.grid
    crops = f", {cache.crops} crops each" if cache.crops > 1 else ""
    print(f"{out}: {cache.size} images of {rows} x {columns} tokens{crops}")
    if left_out := cache.meta["left_out"]:
        print(f"note: {left_out} of {cache.size + left_out} images could not be used and are left out")


def main() -> None:
    """Command line of encode_images."""
    with cli_errors():
        encode_images(parse(EncodeImagesArgs, schema=TrainDVAEArgs, description=__doc__))

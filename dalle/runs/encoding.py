"""Encoding of a dataset into a token cache (2.2): shards of this process, images read by workers."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle.commands.encode_images import EncodeImagesArgs
from dalle.commands.train_dvae import EncodeConfig
from dalle.data import Loader, TokenCache, open_dataset
from dalle.data.bad_samples import BadSampleLog
from dalle.data.dataloader import worker_count
from dalle.data.token_cache import TokenCacheSpec, TokenWriter
from dalle.io.files import make_directory
from dalle.layout import check_tokens
from dalle.runs import ROOT
from dalle.runs.inputs import load_dvae_input
from dalle.train.checkpoint_saver import lock_directory
from dalle.train.config import resume_fingerprint
from dalle.train.precision import autocast, local_device, resolve_precision
from dalle.types import CaptionedImages, ImageTextBatch, ImageTokenizer

TRANSFORM = 1
"""Version of crop and resize; part of the cache's key."""


def encode(args: EncodeImagesArgs) -> TokenCache | None:
    """Encodes the missing shards of this process; returns the cache, or None while other parts have to do."""
    out = args.out or ROOT / "tokens"
    make_directory(out.parent)
    part, parts = resolve_part(args.encode)
    device = local_device(args.device)
    tokenizer, weights = load_dvae_input(args.dvae, device)
    dataset = open_dataset(args.data)
    encoder = Encoder(tokenizer, dataset, args, device)
    writer = TokenWriter(out, encoder.spec(weights), part, parts)
    log = out / (f"bad_samples-{part}.jsonl" if parts > 1 else "bad_samples.jsonl")
    opening = getattr(dataset, "skipped", ())
    with lock_directory(out, f".partial-{part}.lock") as lock:
        bad_samples = BadSampleLog(log, dataset.size, opening, args.data.max_bad_fraction)
        for shard, arrays in encoder.shards(writer, bad_samples):
            writer.write(shard, *arrays)
        cache = writer.finish()
        Path(lock.name).unlink()
    if bad_samples.counts:
        print(f"note: {bad_samples}")
    if cache is None:
        print(f"{out}: part {part} of {parts} is done; the cache is complete when all parts are")
        return None
    rows, columns = cache.grid
    crops = f", {cache.crops} crops each" if cache.crops > 1 else ""
    print(f"{out}: {cache.size} images of {rows} x {columns} tokens{crops}")
    if left_out := cache.meta["left_out"]:
        print(f"note: {left_out} of {cache.size + left_out} images could not be used and are left out")
    return cache


def resolve_part(config: EncodeConfig) -> tuple[int, int]:
    """(part, parts) of this process: as configured, else torchrun's RANK and WORLD_SIZE, else (0, 1)."""
    if (config.part is None) != (config.parts is None):
        raise ValueError("give both --encode.part and --encode.parts, or neither")
    if config.part is not None:
        return config.part, config.parts
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class ShardReader:
    """Step -> one crop of one batch of a shard, for the workers."""

    dataset: CaptionedImages
    spec: TokenCacheSpec
    shards: tuple[int, ...]
    batch_size: int
    seed: int

    def steps(self, shard: int) -> range:
        """The steps of the shard at this position."""
        count = -(-self.spec.shard // self.batch_size) * self.spec.crops
        return range(shard * count, (shard + 1) * count)

    def samples(self, step: int) -> list[tuple[int, int]]:
        """(crop, image) of a step; none behind the end of a short last shard."""
        shard, within = divmod(step, len(self.steps(0)))
        batch, crop = divmod(within, self.spec.crops)
        numbers = self.spec.numbers(self.shards[shard])
        return [(crop, n) for n in numbers[batch * self.batch_size : (batch + 1) * self.batch_size]]

    def __call__(self, step: int) -> ImageTextBatch | None:
        samples = self.samples(step)
        return self.dataset.load(samples, "transformer", self.seed) if samples else None


class Encoder:
    """Encodes the images of a dataset with any image tokenizer."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        dataset: CaptionedImages,
        args: EncodeImagesArgs,
        device: torch.device,
    ):
        self.tokenizer, self.dataset, self.args, self.device = tokenizer, dataset, args, device
        self.precision = resolve_precision(args.encode.precision, device)
        self.crops = 1 if dataset.size is None else args.encode.crops
        self.side, rest = divmod(args.data.resolution, tokenizer.downsample_factor)
        if rest:
            raise ValueError(
                f"data.resolution {args.data.resolution} is no multiple of {tokenizer.downsample_factor}, "
                "the pixels on a side of a token; change it"
            )

    def spec(self, weights: str) -> TokenCacheSpec:
        """Everything that the tokens depend on."""
        config = self.args.encode
        data = resume_fingerprint(self.args.data)
        for name in ("path", "image_root", "val_path"):
            del data[name]  # the hash of the dataset identifies the images, wherever they are
        transform = {"listing": 2, "version": TRANSFORM, "seed": self.args.seed, "precision": self.precision}
        return TokenCacheSpec(
            dvae=weights,
            data=self.dataset.hash,
            grid=(self.side, self.side),
            vocab=self.tokenizer.vocab_size,
            images=min(config.images, self.dataset.size or config.images),
            crops=self.crops,
            shard=config.shard,
            transform=transform | {"data": data},
        )

    def shards(self, writer: TokenWriter, bad_samples: BadSampleLog) -> Iterator[tuple[int, tuple]]:
        """(shard, (tokens uint16 (n, crops, length), captions)) of each missing shard."""
        data, spec, missing = self.args.data, writer.spec, writer.missing()
        reader = ShardReader(self.dataset, spec, tuple(missing), self.args.encode.batch_size, self.args.seed)
        done = set(writer.own()) - set(missing)
        seen = sum(len(spec.numbers(shard)) for shard in done)
        total = sum(len(spec.numbers(shard)) for shard in writer.own())
        steps, workers = len(missing) * len(reader.steps(0)), worker_count(data.workers, self.dataset.size)
        with (
            tqdm(total=total, initial=seen, desc="tokens", unit="image", disable=None) as bar,
            Loader(reader, steps, workers, data.prefetch) as load,
        ):
            for position, shard in enumerate(missing):
                tokens: dict[int, list[np.ndarray]] = {}  # image -> its crops
                captions: dict[int, list[str]] = {}
                for step in reader.steps(position):
                    batch = load(step)
                    if batch is None:
                        break
                    rows = self._encode(batch).numpy().astype(np.uint16)
                    for (_, number), row, texts in zip(batch.samples, rows, batch.captions, strict=True):
                        tokens.setdefault(number, []).append(row)
                        captions[number] = texts
                    if step % self.crops == 0:
                        new = len(reader.samples(step))
                        seen += new
                        bar.update(new)
                    bad_samples.add(batch.skipped, len(done) + step, seen)
                # only images with every crop
                numbers = [number for number in sorted(tokens) if len(tokens[number]) == self.crops]
                array = np.array([tokens[number] for number in numbers], np.uint16)
                array = array.reshape(len(numbers), self.crops, self.side**2)  # also of no image
                yield shard, (array, [captions[number] for number in numbers])

    def _encode(self, batch: ImageTextBatch) -> Tensor:
        """int64 (B, rows * columns)."""
        expected = (len(batch.samples), self.side**2)
        if not batch.samples:
            return torch.zeros(expected, dtype=torch.int64)
        pixels = torch.from_numpy(batch.pixels).to(self.device, memory_format=torch.channels_last)
        with torch.inference_mode(), autocast(self.precision, self.device):
            tokens = self.tokenizer.encode(pixels)
        if tokens.shape != expected:
            raise ValueError(f"the image tokenizer gave {tuple(tokens.shape)} tokens, expected {expected}")
        check_tokens(tokens, self.tokenizer.vocab_size, "image tokens")
        return tokens.cpu()

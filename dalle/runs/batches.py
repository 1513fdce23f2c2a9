"""Batches of the training commands: image crops, caption-image pairs, joint text and image tokens, images
with the conditions of a diffusion model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle.commands.train_diffusion import TrainDiffusionArgs
from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.data import TokenCache, sample_captions
from dalle.data.dataloader import Loader, worker_count
from dalle.data.sampler import batch_indices
from dalle.io.images import check_images
from dalle.layout import TokenLayout
from dalle.sampling import generator
from dalle.shapes.corruptions import corrupted_images
from dalle.text import BPETokenizer, TextTokenizer
from dalle.train.step import step_seed
from dalle.types import CaptionedImages, ImageTextBatch
from dalle.unet.conditions import random_mask, smaller
from dalle.unet.text import pack_text


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
        """(B, 3, H, W). Squares are sampled for the images of all processes: their number changes none."""
        pixels = torch.from_numpy(batch.pixels)
        check_images(pixels)
        if self.crop is None:
            return pixels
        if self.crop > min(pixels.shape[2:]):
            raise ValueError(f"crop {self.crop} exceeds the images, {tuple(pixels.shape[2:])}; lower it")
        rng, count = generator("squares", step_seed(self.seed, step)), len(pixels)
        own = slice(self.rank * count, (self.rank + 1) * count)
        free = [side - self.crop + 1 for side in pixels.shape[2:]]
        rows, columns = (rng.integers(places, size=self.world * count)[own] for places in free)
        squares = zip(pixels, rows, columns, strict=True)
        return torch.stack([image[:, y : y + self.crop, x : x + self.crop] for image, y, x in squares])


@dataclass(frozen=True)
class CLIPBatch:
    """Pixels and text ids of a step, one caption sampled for each image."""

    text: TextTokenizer
    """Turns captions into ids."""
    seed: int
    """Of the captions."""
    broken: CaptionedImages | None = None
    """The shapes, for corrupted copies of the images."""

    def __call__(self, batch: ImageTextBatch, step: int = 0) -> tuple[Any, ...]:
        """(B, 3, R, R), B lists of ids, and (B, 3, R, R) of broken images where they are asked for."""
        ids = [self.text.encode(caption) for caption in sample_captions(batch, self.seed)]
        pixels = torch.from_numpy(batch.pixels)
        check_images(pixels)
        if self.broken is None:
            return pixels, ids
        broken = corrupted_images(self.broken, [index for _, index in batch.samples])
        return pixels, ids, torch.from_numpy(broken)


@dataclass(frozen=True)
class DiffusionBatch:
    """Pixels of a step and the conditions of a diffusion model.

    All that is random depends on (seed, epoch, image) alone.
    """

    run: TrainDiffusionArgs
    text: TextTokenizer | None
    """Turns captions into ids, for a model of text."""
    caption_dropout: float
    """Share of the captions that are emptied."""

    def __call__(self, batch: ImageTextBatch, step: int = 0) -> tuple[dict[str, Tensor], int]:
        """A batch of `DiffusionObjective`, and how many captions were cut."""
        run, model = self.run, self.run.model
        made, truncated = {"pixels": torch.from_numpy(batch.pixels)}, 0
        check_images(made["pixels"])
        rngs = [generator("conditions", run.seed, epoch, index) for epoch, index in batch.samples]
        if self.text is not None:
            pairs = zip(rngs, sample_captions(batch, run.seed), strict=True)
            kept = [[] if r.random() < self.caption_dropout else self.text.encode(c) for r, c in pairs]
            truncated = sum(len(ids) > model.text_len for ids in kept)
            made["text"] = pack_text(kept, model.text_len, model.text_vocab, truncate=True)
        if model.classes is not None:
            names = {name: label for label, name in enumerate(run.class_names)}
            if unknown := [c for c in sample_captions(batch, run.seed) if c not in names]:
                raise ValueError(f"caption {unknown[0]!r:.80} is none of class_names; add it to them")
            made["labels"] = torch.tensor([names[caption] for caption in sample_captions(batch, run.seed)])
        if model.low_resolution:
            blurred = torch.tensor([rng.random() < run.blurred for rng in rngs])
            made["low_resolution"] = smaller(2 * made["pixels"] - 1, run.low_resolution, blurred)
        if model.inpainting:
            made["mask"] = torch.stack([random_mask(rng, model.image_size) for rng in rngs])
        return made, truncated


@dataclass(frozen=True)
class TokenBatches:
    """Joint ids of a step: a caption of each image, encoded with dropout, and its image tokens.

    Which caption and which merges are skipped depends on (seed, epoch, image) alone. Of `world` processes
    each takes its share of the step: joined in the order of `rank` they are the step of one.
    """

    cache: TokenCache
    text: BPETokenizer
    layout: TokenLayout
    run: TrainTransformerArgs
    rank: int = 0
    world: int = 1

    @property
    def trained(self) -> int:
        """Number of images that are trained on: all but the last."""
        return self.cache.size - self.run.eval_samples

    def __call__(self, step: int) -> tuple[Tensor, int]:
        """Ids int64 (B / world, N), and how many captions were cut.

        A sample is one crop of one image: all images in one crop, then the next.
        """
        size = self.cache.crops * self.trained
        indices = batch_indices(step, self.run.train.batch_size, size, self.run.seed, self.rank, self.world)
        samples = [(epoch, *divmod(sample, self.trained)) for epoch, sample in indices]
        _, crops, images = zip(*samples, strict=True)
        captions = [
            self._caption(epoch, crop * self.cache.size + image, texts)
            for (epoch, crop, image), texts in zip(samples, self.cache.captions(images), strict=True)
        ]
        truncated = sum(len(ids) > self.layout.max_caption_len for ids in captions)
        return self._pack(captions, images, crops), truncated

    def val(self) -> Tensor:
        """The last images, in their first crop, first caption each, without dropout."""
        images = range(self.trained, self.cache.size)
        return self._pack([self.text.encode(texts[0]) for texts in self.cache.captions(images)], images)

    def val_batches(self) -> list[Tensor]:
        """`val` in batches of one forward pass of a training step, which fit and are compiled for already."""
        train = self.run.train
        return list(self.val().split(max(1, train.batch_size // (self.world * train.grad_accum_steps))))

    def val_captions(self, count: int) -> list[str]:
        """The first captions of the first held-out images."""
        images = range(self.trained, min(self.trained + count, self.cache.size))
        return [texts[0] for texts in self.cache.captions(images)]

    def _pack(
        self, captions: list[list[int]], images: Sequence[int], crops: Sequence[int] | None = None
    ) -> Tensor:
        text_tokens = self.layout.pad_text(captions, truncate=True)
        return self.layout.pack(text_tokens, self.cache.image_tokens(images, crops))

    def _caption(self, epoch: int, row: int, captions: list[str]) -> list[int]:
        """One of an image's captions as ids; every crop of the image is a row of its own."""
        rng = generator("caption", self.run.seed, epoch, row)
        if rng.random() < self.run.caption_dropout:
            return []
        caption = captions[rng.integers(len(captions))]
        return self.text.encode(caption, self.run.bpe_dropout, (self.run.seed, epoch, row))


class TokenLoader(Loader):
    """The ids of a step, made ahead of time by workers; `truncated` counts captions that were cut."""

    def __init__(self, batches: TokenBatches, pin: bool = False):
        run = batches.run
        workers = worker_count(run.data.workers, batches.cache.size)
        super().__init__(batches, run.steps, workers, run.data.prefetch, pin=pin)
        self.truncated = 0

    def __call__(self, step: int) -> Tensor:
        ids, truncated = super().__call__(step)
        self.truncated += truncated
        return ids

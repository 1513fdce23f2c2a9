"""Protocols shared by all modules: image tokenizer, scorer, objective, dataset, pixels and tokens.

Pixels are float (B, 3, H, W) in [0, 1] everywhere; only the dVAE maps them to its own range. Tokens are
int64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


@dataclass
class Loss:
    """The scalar to minimize, and metrics to log (detached tensors or numbers)."""

    total: Tensor
    metrics: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class ImageTokenizer(Protocol):
    """Maps pixels to a grid of discrete codes and back, as the dVAE and VQGAN do."""

    downsample_factor: int
    vocab_size: int

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> int64 (B, h * w), raster order."""
        ...

    def decode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """int64 (B, h * w) -> (B, 3, H, W) in [0, 1]; `grid` defaults to a square."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Scores how well images match a caption; differentiable in the pixels."""

    def score(self, pixels: Tensor, caption: str) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N,), higher is better."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """Embeds images and captions into one space, as CLIP does; their cosine is the match."""

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> unit vectors (N, E)."""
        ...

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Captions -> unit vectors (N, E)."""
        ...


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class StepCost:
    """Work of one training step, for throughput and MFU."""

    samples: int
    """Images or image-text pairs."""
    tokens: int = 0
    """Tokens processed; 0 for a model without tokens."""
    flops: float = 0.0
    """Floating-point operations of forward and backward, 2 per multiply-add; 0 if unknown."""


@dataclass(frozen=True)
class BatchShard:
    """The shard of a step's batch for one call of an objective: of a process or an accumulation pass."""

    index: int = 0
    """Rank of the shard; the shards in order form the batch."""
    count: int = 1
    """Number of shards, all of equal size."""
    num_targets: Tensor | None = None
    """The objective's `num_targets` summed over all shards; None for a single shard."""
    sum: Callable[[Tensor], Tensor] = _same
    """All-reduce (sum) over the processes, without gradient."""
    gather: Callable[[Tensor], Tensor] = _same
    """All-gather (B, ...) over the processes in rank order, with gradient."""


FULL_BATCH = BatchShard()


class Objective(Protocol):
    """Training objective of a model family; the training loop knows no family.

    The mean over the shards of a batch must equal the value for the whole batch. Where a mean is over a
    number that varies (text tokens, not images), a method `num_targets(model, batch) -> Tensor` counts them
    for a shard, and `part.num_targets` holds the sum over all shards. `part` is passed only when there are
    several shards.

    Optional methods, for the log: `step_cost(model, batch) -> StepCost`, called once per run, and
    `random_baseline(model) -> {metric: value}`, the values of an uninformed model.
    """

    def __call__(
        self, model: torch.nn.Module, batch: Any, step: int, part: BatchShard = FULL_BATCH
    ) -> Loss: ...


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used."""

    index: int | None
    """Its index in the dataset; None for a sample without one, such as an image without captions."""
    name: str
    """Name in reports."""
    cause: str
    """As in `dalle.data.bad_samples.BadSampleError`, or "filter:NAME"."""
    detail: str = ""
    """Details of the cause."""


@dataclass
class ImageTextBatch:
    """A batch of captioned images, ready for training."""

    pixels: np.ndarray
    """float32 (B, 3, R, R) in [0, 1]."""
    captions: list[list[str]]
    """All captions of each image."""
    samples: list[tuple[int, int]]
    """(epoch, index) of each image."""
    skipped: list[BadSample] = field(default_factory=list)
    """Bad samples met while loading the batch."""


class CaptionedImages(Protocol):
    """Dataset of captioned images by index. `size` is None if endless; `hash` identifies the content."""

    resolution: int
    size: int | None
    hash: str

    def load(
        self, samples: Sequence[tuple[int, int]], augment: str = "none", seed: int = 0, replace: bool = False
    ) -> ImageTextBatch:
        """The images of (epoch, index) samples; a random crop depends on (seed, epoch, index) alone.

        A bad sample is left out or, with `replace`, replaced by another one so that the batch keeps its size;
        either way it is reported in `skipped`.
        """
        ...

    def captions(self, indices: Sequence[int]) -> list[list[str]]:
        """All captions of each image, read without decoding images; none for a bad sample."""
        ...


@dataclass(frozen=True)
class RawSample:
    """One captioned image as stored on disk."""

    name: str
    """Name in reports: "cats/0001.jpg", "train-0003.tar/000123"."""
    image: bytes
    """The encoded file."""
    captions: list[str]
    """As stored, unfiltered; may be empty."""


class DataSource(Protocol):
    """Captioned images by index, as stored in a folder, a table or tars. `hash` identifies the content.

    `skipped` lists bad samples found while opening; they have no index.
    """

    hash: str
    skipped: Sequence[BadSample]

    def __len__(self) -> int: ...

    def read(self, index: int) -> RawSample:
        """One sample; ValueError that names the sample and the cause if it cannot be read."""
        ...

    def captions(self, index: int) -> list[str]:
        """The captions of `read`, without reading the image."""
        ...

    def name(self, index: int) -> str:
        """The name of `read`; decides the split of the sample."""
        ...

    def shares(self) -> np.ndarray:
        """uint32 (N,), a hash of each name."""
        ...


class TextTokenizerLike(Protocol):
    """Text tokenizer: captions to ids and back."""

    vocab_size: int
    hash: str

    def encode(
        self, caption: str, dropout: float = 0.0, seed: tuple[int, ...] | int | None = None
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...

    def save(self, path: Path | str) -> None: ...

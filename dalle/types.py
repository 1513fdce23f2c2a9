"""What the parts say to each other: protocols, the loss record, and the contracts at every door.

Pixels are float (B, 3, H, W) in [0, 1] everywhere; only the dVAE maps them inward.
Tokens are int64. A contract is checked with a sentence, not with a crash further down.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@dataclass
class Loss:
    """A scalar to minimize and what to log beside it (detached scalars, tensors or numbers)."""

    total: Tensor
    metrics: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class ImageTokenizer(Protocol):
    """Turns pixels into a grid of integers and back. The dVAE is one; a VQGAN would be another."""

    downsample_factor: int
    vocab_size: int

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> int64 (B, h * w), raster order."""
        ...

    def decode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """int64 (B, h * w) -> (B, 3, H, W) in [0, 1]; the grid is square unless given."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Says how well images fit a caption; differentiable in the pixels."""

    def score(self, pixels: Tensor, caption: str) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N,), higher is better."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """Puts images and captions into one space, where the cosine of two says how well they fit."""

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
    """What an update on a batch asks of the machine."""

    samples: int
    """Images or pairs in it."""
    tokens: int = 0
    """Tokens that the model reads; 0 where it reads none."""
    flops: float = 0.0
    """Floating-point operations that forward and backward need, 2 a multiplication with addition; 0 if not known."""


@dataclass(frozen=True)
class BatchShard:
    """Which part of a step's batch a call of an objective sees: one process's, or one pass's of several."""

    index: int = 0
    """Its place; the parts in order are the batch."""
    count: int = 1
    """Parts in all, of equal size."""
    counts: Tensor | None = None
    """The objective's own `counts`, summed over all parts; None where there is one part, or the objective has none."""
    sum: Callable[[Tensor], Tensor] = _same
    """Adds up a tensor over the processes, without gradient."""
    gather: Callable[[Tensor], Tensor] = _same
    """(B, ...) of each process -> those of all in order, with gradient."""


FULL_BATCH = BatchShard()


class Objective(Protocol):
    """What the training loop minimizes; it alone knows the model's family.

    The mean of what it returns for the parts of a batch must be what it returns for the batch. Where a mean is over a
    number that varies (text tokens, not images), a method `counts(model, batch) -> Tensor` says how many a part has,
    and `part.counts` how many there are in all. `part` is given only where there are several.

    Two more methods may be there, for the log: `work(model, batch) -> StepCost`, asked once, since all batches of a run are
    alike; and `chance(model) -> {metric: value}`, what a model that knows nothing reaches.
    """

    def __call__(
        self, model: torch.nn.Module, batch: Any, step: int, part: BatchShard = FULL_BATCH
    ) -> Loss: ...


@dataclass(frozen=True)
class BadSample:
    """One sample that cannot be used."""

    index: int | None
    """Its number among the pairs; None where it has none, as an image without captions."""
    name: str
    """Names it for people."""
    cause: str
    """One of `dalle.data.bad_samples.CAUSES`, or "filter:NAME"."""
    detail: str = ""
    """What was found."""


@dataclass
class ImageTextBatch:
    """Captioned images, ready to train on."""

    pixels: np.ndarray
    """float32 (B, 3, R, R) in [0, 1]."""
    captions: list[list[str]]
    """Every caption of each."""
    samples: list[tuple[int, int]]
    """(epoch, index) of each."""
    skipped: list[BadSample] = field(default_factory=list)
    """Those that were met and left out."""


class CaptionedImages(Protocol):
    """Captioned images by number. `size` is None for an endless set; `hash` names which images they are."""

    resolution: int
    size: int | None
    hash: str

    def load(
        self, samples: Sequence[tuple[int, int]], augment: str = "none", seed: int = 0, replace: bool = False
    ) -> ImageTextBatch:
        """The images of (epoch, index) samples; a random crop depends on (seed, epoch, index) alone.

        One that cannot be used is left out, or replaced by another of the set where `replace` is set, so that
        the batch keeps its size; either way it is told in `skipped`.
        """
        ...

    def captions(self, indices: Sequence[int]) -> list[list[str]]:
        """Every caption of each image, read without the images; none for one that cannot be used."""
        ...


@dataclass(frozen=True)
class RawSample:
    """One captioned image as it lies on disk."""

    name: str
    """Names it for people: "cats/0001.jpg", "train-0003.tar/000123"."""
    image: bytes
    """The file, not yet decoded."""
    captions: list[str]
    """As written; may be empty, and says nothing of their worth."""


class DataSource(Protocol):
    """Captioned images by number, as they lie in a folder, a table or tars. `hash` names which they are.

    `skipped` tells what was found to be unusable while opening; such samples have no number.
    """

    hash: str
    skipped: Sequence[BadSample]

    def __len__(self) -> int: ...

    def read(self, index: int) -> RawSample:
        """ValueError, naming the sample and the cause, for one that cannot be read."""
        ...

    def captions(self, index: int) -> list[str]:
        """Those of `read`, without reading the image."""
        ...

    def name(self, index: int) -> str:
        """That of `read`; says which part of a split the sample falls into."""
        ...

    def shares(self) -> np.ndarray:
        """uint32 (N,), a hash of each name."""
        ...


class TextTokenizerLike(Protocol):
    """Turns captions into ids; the text tokenizer is one."""

    vocab_size: int
    hash: str

    def encode(
        self, caption: str, dropout: float = 0.0, seed: tuple[int, ...] | int | None = None
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...

    def save(self, path: Path | str) -> None: ...


def check_images(pixels: Tensor, multiple_of: int = 1) -> None:
    """ValueError unless pixels are float (B, 3, H, W), finite, in [0, 1], sides a multiple."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be (B, 3, H, W), got {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise ValueError(f"pixels must be float in [0, 1], got {pixels.dtype}; divide uint8 images by 255")
    if not pixels.numel():
        raise ValueError(f"pixels must hold an image, got none: {tuple(pixels.shape)}")
    if pixels.shape[2] % multiple_of or pixels.shape[3] % multiple_of:
        raise ValueError(
            f"image sides must be multiples of {multiple_of}, got {tuple(pixels.shape[2:])}; crop or resize first"
        )
    low, high = pixels.detach().aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError("pixels hold NaN or infinite values")
    if low < -1e-3 or high > 1 + 1e-3:
        hint = "divide by 255" if high > 2 else "map [-1, 1] by (x + 1) / 2" if low < 0 else "clamp to [0, 1]"
        raise ValueError(f"pixels must lie in [0, 1], got [{float(low):.3g}, {float(high):.3g}]; {hint}")


def token_grid(tokens: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, columns) of image tokens (B, N): those given, else a square; ValueError unless N tokens fill it."""
    side = math.isqrt(tokens.shape[1])
    rows, columns = grid or (side, side)
    if rows * columns != tokens.shape[1]:
        raise ValueError(
            f"{tokens.shape[1]} tokens do not fill a grid of {rows} x {columns}; give grid=(rows, columns)"
        )
    return rows, columns


def check_tokens(tokens: Tensor, vocab_size: int, name: str = "tokens") -> None:
    """ValueError, naming position and value, unless tokens are int64 (B, N) in [0, vocab_size)."""
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 (B, N), got {tokens.dtype} {tuple(tokens.shape)}")
    bad = (tokens < 0) | (tokens >= vocab_size)
    if bad.any():
        row, position = bad.nonzero()[0].tolist()
        value = int(tokens[row, position])
        raise ValueError(
            f"{name} must be in [0, {vocab_size}), got {value} at row {row}, position {position}"
        )

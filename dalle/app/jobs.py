"""What the web page does, without the page: requests and their limits, uploads, drawing, the download."""

import base64
import secrets
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from PIL import Image

from dalle.app.config import Limits
from dalle.commands.sample import SampleArgs
from dalle.data.image_decode import decode, open_image
from dalle.io.images import resize_center_crop
from dalle.pipelines.best_of_n import GenerationProgress, auto_batch_size
from dalle.pipelines.completion import prefix_tokens
from dalle.pipelines.config import SamplingConfig
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import Generation, slug, write_sample

DEFAULTS = SampleArgs()
SEEDS = 2**31  # seeds that are made up lie below, so that they are easy to type again
LARGEST_SEED = 2**53 - 1  # a browser's numbers are exact up to here


@dataclass(frozen=True)
class Request:
    """What a visitor asks for; the defaults are those of scripts/sample.py."""

    caption: str = ""
    seed: int | None = None
    """None makes one up."""
    n: int = DEFAULTS.num_images
    best_of: int = DEFAULTS.best_of
    temperature: float = DEFAULTS.sampling.temperature
    top_k: int | None = DEFAULTS.sampling.top_k
    top_p: float | None = DEFAULTS.sampling.top_p
    guidance: float | None = DEFAULTS.sampling.guidance
    image: Path | None = None
    """An image whose top rows are kept."""
    rows: int | None = None
    """Rows of tokens to keep of it."""

    def check(self, limits: Limits) -> None:
        """ValueError for what is beyond the limits, or means nothing."""
        if len(self.caption) > limits.caption:
            raise ValueError(
                f"the caption has {len(self.caption):,} letters, at most {limits.caption:,} are read"
            )
        for name, value, most in (
            ("images", self.n, limits.images),
            ("best of", self.best_of, limits.candidates),
        ):
            if value is None:
                raise ValueError(f"the field of {name} is blank; give a number from 1 to {most}")
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be 1 to {most} here, got {value}")
        if self.best_of < self.n:
            raise ValueError(
                f"best of must be at least as many as the images, got {self.best_of} for {self.n}"
            )
        if self.temperature is None:
            raise ValueError("temperature is blank; give 1 as the paper, or less for likelier images")
        if self.seed is not None and not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(
                f"the seed must be 0 to {LARGEST_SEED}, got {self.seed}; leave it blank for a new one"
            )
        SamplingConfig(**self.sampling)

    @property
    def sampling(self) -> dict[str, Any]:
        """How tokens are drawn, as `dalle.pipelines.config.SamplingConfig` takes it."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "guidance")}


def number(name: str, text: str | None, kind: type[int] | type[float]) -> int | float | None:
    """What stands in a field, None if it is blank; ValueError for what is no number."""
    if not (text or "").strip():
        return None
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {wanted}, or blank; got {text[:40]!r}") from None


class Work:
    """A request at work: checked when it is made, drawn while it is looped over.

    Args:
        model: draws.
        request: what is asked for.
        limits: what may be asked for.

    Raises:
        ValueError: a request that cannot be met, in a sentence for the visitor.
    """

    def __init__(self, model: DALLE, request: Request, limits: Limits):
        request.check(limits)
        self.model, self.request = model, request
        self.seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        self.best_of = request.best_of if model.scorer else request.n
        batch_size = auto_batch_size(model.transformer, request.guidance)
        self.settings = request.sampling | {"batch_size": batch_size}
        prefix = None
        if request.image is not None:
            prefix = prefix_tokens(model, open_upload(request.image, limits), request.rows)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            counts = (request.n, self.best_of, self.seed)
            self._steps = model.steps([request.caption], *counts, SamplingConfig(**self.settings), prefix)
        self.warnings = [str(one.message) for one in caught if one.category is UserWarning]
        """What the visitor shall know, such as letters that the model never saw."""
        self.generation: Generation | None = None
        """The best so far."""

    def steps(self, stop: Event) -> Iterator[GenerationProgress]:
        """After each row of tokens and each block; ends early once `stop` is set."""
        for progress in self._steps:
            if progress.ranked:
                (self.generation,) = progress.generations
            if progress.ranked or progress.whole_rows:
                yield progress
            if stop.is_set():
                self._steps.close()

    def options(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What scripts/sample.py would be given for the same images, for sample.json."""
        asked = {
            "n": self.request.n,
            "best_of": self.generation.num_generated,
            "seed": self.seed,
        } | self.settings
        if self.request.image is not None:
            asked |= {"image": self.request.image.name, "rows": self.request.rows}
        return asked | facts


def open_upload(path: Path, limits: Limits) -> Image.Image:
    """An uploaded image as RGB; ValueError, which names no path of the server, for one that cannot be
    used."""
    size = path.stat().st_size
    if size > limits.upload:
        raise ValueError(
            f"{path.name} has {size / 2**20:.1f} MiB; expected at most {limits.upload / 2**20:.0f}"
        )
    image = open_image(path.read_bytes(), path.name)
    if image.width * image.height > limits.pixels:
        raise ValueError(
            f"{path.name} has {image.width} x {image.height} pixels; expected at most {limits.pixels:,} in "
            "all"
        )
    return decode(image, path.name)


def kept_part(image: Image.Image, rows: int, model: DALLE) -> Image.Image:
    """The middle square of an image at the model's size, grey where the model is to draw."""
    layout = model.transformer.layout
    square = resize_center_crop(image, layout.rows * model.dvae.downsample_factor)
    top = rows * model.dvae.downsample_factor
    square.paste((128, 128, 128), (0, top, square.width, square.height))
    return square


def standing(progress: GenerationProgress, layout_columns: int, layout_rows: int) -> str:
    """How far the drawing is, in words."""
    first = progress.batch.candidates[0] + 1
    last = first + progress.batch.wanted - 1
    these = f"candidates {first} to {last}" if last > first else f"candidate {first}"
    row = progress.tokens.shape[2] // layout_columns
    return f"Drawing {these} of {progress.best_of}: row {row} of {layout_rows}"


def ended(generation: Generation, took: float) -> str:
    """What came out, in words."""
    count = len(generation.images)
    images = "1 image" if count == 1 else f"{count} images"
    ranked = f"the best of {generation.num_generated}" if generation.scores else "unranked"
    stopped = (
        f"Stopped after {generation.num_generated} of {generation.best_of} candidates. "
        * generation.interrupted
    )
    return f"{stopped}{images[0].upper()}{images[1:]}, {ranked}. Seed {generation.seed}, {took:.1f} s."


def label(generation: Generation, place: int) -> str:
    """The words under an image: its place, and what the scorer gave."""
    if generation.scores is None:
        return f"candidate {generation.candidates[place]}"
    return f"{place + 1}: score {generation.scores[place]:.3f}"


def data_url(image: Image.Image) -> str:
    """An image as text that a page shows without a file on the server."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def write_zip(folder: Path, model: DALLE, generation: Generation, options: dict[str, Any]) -> Path:
    """What scripts/sample.py writes (00.png, ..., grid.png, sample.json), as one file named after the
    caption."""
    path = folder / f"{slug(generation.prompt)}-{generation.seed}.zip"
    with TemporaryDirectory(dir=folder) as inner, zipfile.ZipFile(path, "w") as archive:
        write_sample(Path(inner), model, generation, options)
        for file in sorted(Path(inner).iterdir()):
            archive.write(file, file.name)
    return path

"""Results of sampling: the images of one prompt, best first, and log-likelihoods."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dalle.io.images import image_grid


@dataclass
class Generation:
    """Images of one prompt, best first; shows itself in a notebook."""

    prompt: str
    seed: int
    images: list[Image.Image]
    scores: list[float] | None
    image_tokens: Tensor
    """int64 (n, h * w), on the CPU."""
    candidates: list[int]
    """Index of the candidate that each image is; with the seed it identifies the image."""
    num_generated: int
    """Candidates that were generated and ranked."""
    best_of: int
    """Candidates that were asked for; more than `num_generated` where sampling was interrupted."""

    @property
    def interrupted(self) -> bool:
        """Whether the images are the best of fewer candidates than were asked for."""
        return self.num_generated < self.best_of

    def grid(self, columns: int = 4) -> Image.Image:
        """All images in one, row by row."""
        rows = [self.images[i : i + columns] for i in range(0, len(self.images), columns)]
        return image_grid(rows, scale=max(1, 256 // self.images[0].width))

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.grid().save(buffer, format="PNG")
        return buffer.getvalue()


def merge_generations(parts: Sequence[Generation], n: int) -> Generation:
    """The n best of the shards of one prompt, as several processes generated them."""
    scored = parts[0].scores is not None
    ranked = [
        (-part.scores[i] if scored else 0.0, candidate, part.images[i], part.image_tokens[i])
        for part in parts
        for i, candidate in enumerate(part.candidates)
    ]
    best = sorted(ranked, key=lambda one: one[:2])[:n]
    scores, candidates, images, tokens = zip(*best, strict=True)
    return Generation(
        parts[0].prompt,
        parts[0].seed,
        list(images),
        [-score for score in scores] if scored else None,
        torch.stack(tokens),
        list(candidates),
        sum(part.num_generated for part in parts),
        parts[0].best_of,
    )


class LogLikelihood(NamedTuple):
    """Log-likelihood in nats of a caption, and of an image's tokens after it: numbers, or one per image."""

    text: float | Tensor
    """Sum over the caption's tokens and its end."""
    image: float | Tensor
    """Sum over the image tokens."""


def slug(prompt: str, length: int = 60) -> str:
    """File name part for any prompt: its a-z and digits joined by "-", or "prompt" if it has none."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:length].rstrip("-") or "prompt"


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG that is complete if it exists."""
    partial = path.with_name(f".partial-{path.name}")
    image.save(partial, format="PNG")
    os.replace(partial, path)


def write_images(
    generation: Generation, folder: Path, model: Any, stem: str = "", log_likelihood: bool = False
) -> list[dict[str, Any]]:
    """Writes <stem>00.png, <stem>01.png, ... (best first) and <stem>grid.png; returns a record of each image.

    `model` is the `DALLE` that computes the log-likelihood of prompt and image, if it is to be recorded.
    """
    records = []
    for i, image in enumerate(generation.images):
        file = f"{stem}{i:02d}.png"
        save_png(image, folder / file)
        record = {
            "file": file,
            "prompt": generation.prompt,
            "seed": generation.seed,
            "candidate": generation.candidates[i],
            "score": generation.scores[i] if generation.scores else None,
        }
        records.append(record)
    if log_likelihood:
        nats = model.log_likelihood(generation.prompt, generation.image_tokens, truncate=True)
        for record, text, image in zip(records, nats.text.tolist(), nats.image.tolist(), strict=True):
            record["log_likelihood"] = {"text": text, "image": image}
    save_png(generation.grid(), folder / f"{stem}grid.png")
    return records

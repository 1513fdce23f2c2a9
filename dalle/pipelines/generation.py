"""What drawing gives: images of one prompt, best first."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

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
    """Which candidate each image is: with the seed it names the image for good."""
    drawn: int
    """Candidates that were drawn."""
    best_of: int
    """Candidates that were asked for; more than `drawn` where drawing was interrupted."""

    @property
    def partial(self) -> bool:
        """Whether drawing was interrupted: the images are the best of those drawn until then."""
        return self.drawn < self.best_of

    def grid(self, columns: int = 4) -> Image.Image:
        """All images on one sheet, row by row."""
        rows = [self.images[i : i + columns] for i in range(0, len(self.images), columns)]
        return image_grid(rows, scale=max(1, 256 // self.images[0].width))

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.grid().save(buffer, format="PNG")
        return buffer.getvalue()


def merge_generations(parts: Sequence[Generation], n: int) -> Generation:
    """The n best of what several processes drew for one prompt (`dalle.pipelines.best_of_n.SamplingConfig.share`)."""
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
        sum(part.drawn for part in parts),
        parts[0].best_of,
    )


class LogLikelihood(NamedTuple):
    """How likely the model finds a caption, and an image's tokens after it, in nats; numbers, or one an image."""

    text: float | Tensor
    """Sum over the caption's tokens and its end."""
    image: float | Tensor
    """Sum over the image tokens."""

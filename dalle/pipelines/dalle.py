"""DALL-E joined: caption -> tokens -> images -> ranked images (paper sections 2 and 2.6).

N images, T text slots, h w grid
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dalle.pipelines.best_of_n import (
    CandidateSampler,
    GenerationProgress,
    SamplingConfig,
    blocks,
    check_counts,
    open_corner,
    partial_images,
)
from dalle.pipelines.generation import Generation, LogLikelihood
from dalle.pipelines.joined import Joined
from dalle.transformer.generate import TO_GENERATE, inference_autocast
from dalle.transformer.losses import log_likelihood
from dalle.types import check_tokens


class DALLE(Joined):
    """The parts joined. `from_pretrained` opens a model directory; `save_pretrained` writes one.

    Args:
        dvae: turns pixels into tokens and back.
        transformer: draws image tokens for text tokens.
        text: the text tokenizer that the transformer was trained with.
        scorer: ranks images; without it they come unranked.
    """

    def generate(
        self,
        prompt: str | Sequence[str],
        n: int = 4,
        best_of: int = 64,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        truncate: bool = False,
        progress: bool = True,
        **settings,
    ) -> Generation | list[Generation]:
        """Draws `best_of` candidates for a caption and keeps the n that the scorer ranks highest.

        Args:
            prompt: the caption, or several: then a list comes back, and captions with few candidates are drawn
                together.
            n: images to keep.
            best_of: candidates to draw; the paper draws 512. Memory does not depend on it.
            seed: with the prompt and a candidate's number it fixes that candidate's random numbers.
            temperature: 1 as the paper; 0 takes the most likely tokens.
            top_k, top_p: draw among the likeliest tokens only.
            guidance: strength of classifier-free guidance; needs a model trained with caption dropout.
            truncate: cut a caption that is too long instead of refusing it.
            progress: show a bar.
            settings: `batch`, `together`, `chunk`, `share`, `graph`, `compile`: see `dalle.pipelines.best_of_n.SamplingConfig`.

        Raises:
            ValueError: an empty or too long prompt, best_of < n, settings out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        drawn = self._ranked(prompts, None, n, best_of, seed, truncate, progress, settings)
        return drawn[0] if isinstance(prompt, str) else drawn

    def complete(
        self,
        prompt: str,
        image: Image.Image | Path | str,
        rows: int | None = None,
        box: tuple[int, int] | None = None,
        n: int = 4,
        best_of: int = 64,
        seed: int = 0,
        truncate: bool = False,
        progress: bool = True,
        **settings,
    ) -> Generation:
        """As `generate`, keeping the top rows of tokens of an image, or all outside a box (section 3.3).

        Args:
            image: its middle square is resized to the model's size.
            rows: rows of tokens to keep, 1 to the grid's rows - 1.
            box: instead, (top, left) in tokens: what lies from there to the lower right corner is drawn anew. A
                token drawn sees the kept ones that come before it, row by row; those to the left of the box in
                lower rows stay, but the rows above them are drawn without knowing them.
            settings: see `dalle.pipelines.best_of_n.SamplingConfig`; the rest as `generate`.

        Raises:
            ValueError: rows or a box beyond the grid; as `generate`.
        """
        beginning = self._beginning(image, rows, box)
        return self._ranked([prompt], beginning, n, best_of, seed, truncate, progress, settings)[0]

    def regenerate(
        self,
        generation: Generation,
        image: int = 0,
        rows: int | None = None,
        box: tuple[int, int] | None = None,
        n: int = 4,
        best_of: int = 64,
        seed: int | None = None,
        truncate: bool = False,
        progress: bool = True,
        **settings,
    ) -> Generation:
        """Draws a part of an image of a Generation anew, from its tokens: what is kept stays token by token.

        Args:
            image: which of its images.
            rows, box: what to keep, as `complete`.
            seed: one more than the generation's unless given: the same seed draws the same candidates.
            settings: see `dalle.pipelines.best_of_n.SamplingConfig`; the rest as `generate`.
        """
        top, left = open_corner(self.transformer.layout.grid, rows, box)
        count = len(generation.image_tokens)
        if not 0 <= image < count:
            raise ValueError(f"image must be 0 to {count - 1}, got {image}")
        tokens = generation.image_tokens[[image]].to(self.device)
        tokens.view(-1, *self.transformer.layout.grid)[:, top:, left:] = TO_GENERATE
        seed = generation.seed + 1 if seed is None else seed
        return self._ranked([generation.prompt], tokens, n, best_of, seed, truncate, progress, settings)[0]

    def stream(
        self, prompt: str, n: int = 1, seed: int = 0, truncate: bool = False, **settings
    ) -> Iterator[list[Image.Image]]:
        """Yields n images after each row of tokens, grey where nothing is drawn yet; candidates 0 .. n - 1, unranked.

        Args:
            settings: see `dalle.pipelines.best_of_n.SamplingConfig`; the rest as `generate`.
        """
        check_counts(n, n)
        columns = self.transformer.layout.columns
        text = self._text_tokens([prompt], truncate, stacklevel=3)
        drawer = CandidateSampler(self.dvae, self.transformer, None, SamplingConfig(**settings))
        block = next(blocks(1, n, drawer.batch, drawer.settings.together))
        if n > block.wanted:
            raise ValueError(f"n must be at most the {block.wanted} rows of a step, got {n}; raise batch")
        for tokens in drawer.tokens([prompt], text, None, seed, block):
            if tokens.shape[2] % columns == 0:
                yield partial_images(self.dvae, self.transformer.layout, tokens[0, :n])

    def watch(
        self,
        prompt: str,
        image: Image.Image | Path | str | None = None,
        rows: int | None = None,
        n: int = 4,
        best_of: int = 64,
        seed: int = 0,
        truncate: bool = False,
        **settings,
    ) -> Iterator[GenerationProgress]:
        """As `generate`, or as `complete` where an image is given, seen at work; all is checked before it returns.

        Yields after each row of tokens and each block that is ranked. Who leaves the loop stops the drawing.

        Args:
            image, rows: see `complete`.
            settings: see `dalle.pipelines.best_of_n.SamplingConfig`; the rest as `generate`.
        """
        if image is None and rows is not None:
            raise ValueError("rows says how much of an image to keep; give the image as image")
        drawer, text, best_of = self._ready([prompt], n, best_of, truncate, settings, stacklevel=4)
        beginning = None if image is None else self._beginning(image, rows, None)
        return drawer.watched(prompt, text, beginning, n, best_of, seed)

    def log_likelihood(
        self, caption: str, image: Image.Image | Path | str | Tensor, truncate: bool = False
    ) -> LogLikelihood:
        """How likely the model finds a caption, and an image after it, in nats.

        Args:
            image: the image (its middle square, through the image tokenizer), or image tokens (N, h * w).

        Returns:
            Numbers for an image, tensors (N,) for image tokens.
        """
        text = self._text_tokens([caption], truncate, stacklevel=3)
        tokens = image.to(self.device) if isinstance(image, Tensor) else self.encode(image)
        check_tokens(tokens, self.transformer.layout.image_vocab, "image tokens")
        ids = self.transformer.layout.pack(text.expand(len(tokens), -1), tokens)
        with inference_autocast(self.transformer):
            found = [log_likelihood(self.transformer, one) for one in ids.split(16)]
        nats = [torch.cat(part).cpu() for part in zip(*found, strict=True)]
        return (
            LogLikelihood(*nats)
            if isinstance(image, Tensor)
            else LogLikelihood(*(float(part) for part in nats))
        )

    def _ranked(self, prompts, prefix, n, best_of, seed, truncate, progress, settings) -> list[Generation]:
        drawer, text, best_of = self._ready(prompts, n, best_of, truncate, settings, stacklevel=5)
        return drawer.ranked(prompts, text, prefix, n, best_of, seed, progress)

    def _ready(
        self, prompts, n, best_of, truncate, settings, stacklevel
    ) -> tuple[CandidateSampler, Tensor, int]:
        """What draws, the text tokens and how many candidates, all checked; warns the caller so many frames up."""
        check_counts(n, best_of)
        drawing = SamplingConfig(**settings)
        text = self._text_tokens(prompts, truncate, stacklevel)
        if self.scorer is None and best_of > n:
            warnings.warn(
                f"this model has no scorer: drawing {n} images, unranked", stacklevel=stacklevel - 1
            )
            best_of = n
        return CandidateSampler(self.dvae, self.transformer, self.scorer, drawing), text, best_of

    def _beginning(
        self, image: Image.Image | Path | str, rows: int | None, box: tuple[int, int] | None
    ) -> Tensor:
        """The tokens of an image that are kept, TO_GENERATE where they are drawn anew: (1, h * w)."""
        layout = self.transformer.layout
        top, left = open_corner(layout.grid, rows, box)
        if layout.rows != layout.columns:
            raise ValueError(f"complete needs a square grid, the model's is {layout.rows} x {layout.columns}")
        tokens = self.encode(image).clone()
        tokens.view(-1, *layout.grid)[:, top:, left:] = TO_GENERATE
        return tokens

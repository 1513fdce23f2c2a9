"""DALL-E joined: caption -> tokens -> pictures -> ranked pictures (paper sections 2 and 2.6).

N pictures, T text slots, h w grid
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dalle.clip import CLIP, CLIPScorer
from dalle.directory import read_directory, write_directory
from dalle.drawing import Block, Drawer, Settings, check_counts, open_corner
from dalle.generation import Generation, LogLikelihood
from dalle.images import load_image, shorter_side, to_pil, to_pixels
from dalle.models import Part, weights_hash
from dalle.text import MergeTokenizer, text_from_dict
from dalle.text.report import pieces_outside
from dalle.train.precision import Precision, resolve_precision
from dalle.transformer import Transformer
from dalle.transformer.generate import OPEN, in_format, own_format
from dalle.transformer.losses import log_likelihood
from dalle.types import ImageTokenizer, Scorer, check_tokens

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DALLE:
    """The parts joined. `from_pretrained` opens a model directory; `save_pretrained` writes one.

    Args:
        dvae: turns pixels into tokens and back.
        transformer: draws image tokens for text tokens.
        text: the text tokenizer that the transformer was trained with.
        scorer: ranks pictures; without it they come unranked.
    """

    def __init__(
        self,
        dvae: ImageTokenizer,
        transformer: Transformer,
        text: MergeTokenizer,
        scorer: Scorer | None = None,
    ):
        layout = transformer.layout
        if dvae.vocab_size != layout.image_vocab:
            raise ValueError(
                f"the image tokenizer has {dvae.vocab_size} codes, the transformer draws {layout.image_vocab}: "
                "they do not belong together"
            )
        if text.vocab_size > layout.text_vocab:
            raise ValueError(
                f"the text tokenizer has {text.vocab_size} ids, the transformer reads {layout.text_vocab}: "
                "they do not belong together"
            )
        self.dvae, self.transformer, self.text, self.scorer = dvae, transformer, text, scorer
        self._hash: str | None = None  # of the weights before they were rounded

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.to_logits.weight.device

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
            n: pictures to keep.
            best_of: candidates to draw; the paper draws 512. Memory does not depend on it.
            seed: with the prompt and a candidate's number it fixes that candidate's random numbers.
            temperature: 1 as the paper; 0 takes the most likely tokens.
            top_k, top_p: draw among the likeliest tokens only.
            guidance: strength of classifier-free guidance; needs a model trained with caption dropout.
            truncate: cut a caption that is too long instead of refusing it.
            progress: show a bar.
            settings: `batch`, `chunk`, `share`, `graph`: see `dalle.drawing.Settings`.

        Raises:
            ValueError: an empty or too long prompt, best_of < n, settings out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        drawn = self._ranked(prompts, None, n, best_of, seed, truncate, progress, settings)
        return drawn[0] if isinstance(prompt, str) else drawn

    def complete(
        self, prompt: str, image: Image.Image | Path | str, rows: int | None = None, box: tuple[int, int] | None = None,
        n: int = 4, best_of: int = 64, seed: int = 0, truncate: bool = False, progress: bool = True, **settings,
    ) -> Generation:  # fmt: skip
        """As `generate`, keeping the top rows of tokens of a picture, or all outside a box (section 3.3).

        Args:
            image: its middle square is resized to the model's size.
            rows: rows of tokens to keep, 1 to the grid's rows - 1.
            box: instead, (top, left) in tokens: what lies from there to the lower right corner is drawn anew. A
                token drawn sees the kept ones that come before it, row by row; those to the left of the box in
                lower rows stay, but the rows above them are drawn without knowing them.
            settings: see `dalle.drawing.Settings`; the rest as `generate`.

        Raises:
            ValueError: rows or a box beyond the grid; as `generate`.
        """
        layout = self.transformer.layout
        top, left = open_corner(layout.grid, rows, box)
        if layout.rows != layout.columns:
            raise ValueError(f"complete needs a square grid, the model's is {layout.rows} x {layout.columns}")
        tokens = self._encode(image).clone()
        tokens.view(-1, *layout.grid)[:, top:, left:] = OPEN
        return self._ranked([prompt], tokens, n, best_of, seed, truncate, progress, settings)[0]

    def regenerate(
        self, generation: Generation, picture: int = 0, rows: int | None = None, box: tuple[int, int] | None = None,
        n: int = 4, best_of: int = 64, seed: int | None = None, truncate: bool = False, progress: bool = True,
        **settings,
    ) -> Generation:  # fmt: skip
        """Draws a part of a picture of a Generation anew, from its tokens: what is kept stays token by token.

        Args:
            picture: which of its pictures.
            rows, box: what to keep, as `complete`.
            seed: one more than the generation's unless given: the same seed draws the same candidates.
            settings: see `dalle.drawing.Settings`; the rest as `generate`.
        """
        top, left = open_corner(self.transformer.layout.grid, rows, box)
        count = len(generation.image_tokens)
        if not 0 <= picture < count:
            raise ValueError(f"picture must be 0 to {count - 1}, got {picture}")
        tokens = generation.image_tokens[[picture]].to(self.device)
        tokens.view(-1, *self.transformer.layout.grid)[:, top:, left:] = OPEN
        seed = generation.seed + 1 if seed is None else seed
        return self._ranked([generation.prompt], tokens, n, best_of, seed, truncate, progress, settings)[0]

    def stream(
        self, prompt: str, n: int = 1, seed: int = 0, truncate: bool = False, **settings
    ) -> Iterator[list[Image.Image]]:
        """Yields n pictures after each row of tokens, grey where nothing is drawn yet; candidates 0 .. n, unranked.

        Args:
            settings: see `dalle.drawing.Settings`; the rest as `generate`.
        """
        check_counts(n, n)
        columns = self.transformer.layout.columns
        text = self._text_tokens([prompt], truncate, stacklevel=3)
        drawer = Drawer(self.dvae, self.transformer, None, Settings(**settings))
        if n > drawer.batch:
            raise ValueError(f"n must be at most the {drawer.batch} rows of a step, got {n}; raise batch")
        block = Block([0], range(drawer.batch), n)
        for tokens in drawer.tokens([prompt], text, None, seed, block):
            if tokens.shape[2] % columns == 0:
                yield to_pil(self._partial(tokens[0, :n]))

    def log_likelihood(
        self, caption: str, image: Image.Image | Path | str | Tensor, truncate: bool = False
    ) -> LogLikelihood:
        """How likely the model finds a caption, and a picture after it, in nats.

        Args:
            image: the picture (its middle square, through the image tokenizer), or image tokens (N, h * w).

        Returns:
            Numbers for a picture, tensors (N,) for image tokens.
        """
        text = self._text_tokens([caption], truncate, stacklevel=3)
        tokens = image.to(self.device) if isinstance(image, Tensor) else self._encode(image)
        check_tokens(tokens, self.transformer.layout.image_vocab, "image tokens")
        ids = self.transformer.layout.pack(text.expand(len(tokens), -1), tokens)
        with own_format(self.transformer):
            found = [log_likelihood(self.transformer, one) for one in ids.split(16)]
        nats = [torch.cat(part).cpu() for part in zip(*found, strict=True)]
        return LogLikelihood(*nats) if isinstance(image, Tensor) else LogLikelihood(*(float(part) for part in nats))

    def in_precision(self, precision: Precision) -> "DALLE":
        """The same model with the matrices of the transformer's layers in bf16 or fp16; all else is shared.

        Drawing reads half the memory then. "auto" takes bf16 where the device multiplies it in hardware. The hash
        stays that of the weights before they were rounded.
        """
        dtype = FORMATS[resolve_precision(precision, self.device)]
        transformer = in_format(self.transformer, dtype)
        if transformer is self.transformer:
            return self
        rounded = DALLE(self.dvae, transformer, self.text, self.scorer)
        rounded._hash = self.hash
        return rounded

    def save_pretrained(self, directory: Path | str) -> None:
        """Writes a model directory: config.json, text.json and a safetensors file a part.

        Raises:
            ValueError: an image tokenizer or scorer that is not one of the library's own models, or a
                directory that cannot be made.
        """
        if self._hash is not None:
            raise ValueError("the weights were rounded by in_precision; save the model that it was made from")
        parts: dict[str, torch.nn.Module] = {"dvae": self.dvae, "transformer": self.transformer}
        if self.scorer is not None:
            parts["clip"] = getattr(self.scorer, "model", None)
        write_directory(Path(directory), parts, self.text, self.hash)

    @classmethod
    def from_pretrained(
        cls, directory: Path | str, device: str | torch.device = "cpu", precision: Precision = "fp32"
    ) -> "DALLE":
        """Opens a model directory written by `save_pretrained`. Nothing is downloaded; precision as `in_precision`.

        Raises:
            ValueError: no such directory, a damaged file, or parts that do not belong together.
        """
        parts, text, expected = read_directory(Path(directory), device)
        scorer = CLIPScorer(parts["clip"], text) if "clip" in parts else None
        model = cls(parts["dvae"], parts["transformer"], text, scorer)
        if model.hash != expected:
            raise ValueError(f"{directory}: the weights have hash {model.hash}, expected {expected}")
        return model.in_precision(precision)

    @classmethod
    def from_parts(
        cls, dvae: Part, transformer: Part, clip: Part | None, text: MergeTokenizer | None = None
    ) -> "DALLE":
        """Joins parts loaded from runs; refuses parts that were not trained for one another."""
        own = text_from_dict(transformer.links["text"])
        if text is not None and text.hash != own.hash:
            raise ValueError(f"{transformer.source} was trained with another text tokenizer than the one given")
        if transformer.links["dvae"] != dvae.hash:
            raise ValueError(
                f"{transformer.source} was trained on tokens of dVAE {transformer.links['dvae']}, "
                f"{dvae.source} is {dvae.hash}: they do not belong together"
            )
        if clip is not None and clip.links["text_hash"] != own.hash:
            raise ValueError(f"{clip.source} was trained with another text tokenizer than {transformer.source}")
        scorer = CLIPScorer(clip.model, own) if clip else None
        return cls(dvae.model, transformer.model, own, scorer)

    @property
    def hash(self) -> str:
        """Names the weights: hashes of the dVAE, the transformer and, if it is our own, the CLIP."""
        if self._hash is not None:
            return self._hash
        clip = getattr(self.scorer, "model", None)
        models = [self.dvae, self.transformer] + [clip] * isinstance(clip, CLIP)
        return "-".join(weights_hash(model) for model in models)

    def text_tokens(self, prompts: Sequence[str], truncate: bool = False) -> Tensor:
        """Captions -> int64 (len(prompts), T); ValueError for an empty or too long one."""
        return self._text_tokens(prompts, truncate, stacklevel=None)

    def _text_tokens(self, prompts: Sequence[str], truncate: bool, stacklevel: int | None) -> Tensor:
        """And warns, at the caller so many frames up, of letters that the vocabulary lacks."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"the prompt must be text, got {type(prompt).__name__}")
        ids = [self.text.encode(prompt) for prompt in prompts]
        if not all(ids):
            raise ValueError("the prompt is empty; say what the picture shall show")
        for prompt in prompts if stacklevel else ():
            if pieces := pieces_outside(self.text, prompt):
                told = ", ".join(map(repr, pieces[:5])) + ", ..." * (len(pieces) > 5)
                message = f"the vocabulary lacks letters of {told}: the model may not know what they mean"
                warnings.warn(message, stacklevel=stacklevel)
        return self.transformer.layout.pad_text(ids, truncate).to(self.device)

    def decode(self, tokens: Tensor) -> Tensor:
        """Image tokens int64 (N, h * w) -> pixels (N, 3, H, W) in [0, 1]."""
        return self.dvae.decode(tokens, self.transformer.layout.grid)

    def _ranked(self, prompts, prefix, n, best_of, seed, truncate, progress, settings) -> list[Generation]:
        check_counts(n, best_of)
        drawing = Settings(**settings)
        text = self._text_tokens(prompts, truncate, stacklevel=4)
        if self.scorer is None and best_of > n:
            warnings.warn(f"this model has no scorer: drawing {n} pictures, unranked", stacklevel=3)
            best_of = n
        drawer = Drawer(self.dvae, self.transformer, self.scorer, drawing)
        return drawer.ranked(prompts, text, prefix, n, best_of, seed, progress)

    def _encode(self, image: Image.Image | Path | str) -> Tensor:
        """The middle square of a picture as image tokens (1, h * w)."""
        square = shorter_side(load_image(image), self.transformer.layout.rows * self.dvae.downsampling)
        return self.dvae.encode(to_pixels([square]).to(self.device))

    def _partial(self, tokens: Tensor) -> Tensor:
        """Pictures of whole rows of tokens (N, r * w), grey below them."""
        layout = self.transformer.layout
        drawn = self.dvae.decode(tokens.clone(), (tokens.shape[1] // layout.columns, layout.columns))
        side = drawn.shape[3] // layout.columns  # of a token
        return torch.nn.functional.pad(drawn, (0, 0, 0, layout.rows * side - drawn.shape[2]), value=0.5)

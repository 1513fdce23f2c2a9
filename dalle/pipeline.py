"""DALL-E joined: caption -> tokens -> pictures -> ranked pictures (paper sections 2 and 2.6).

N pictures, T text slots, h w grid
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dalle.clip import CLIP, CLIPScorer
from dalle.config import to_dict
from dalle.dvae import DVAE
from dalle.files import make_directory, read_json, write_json
from dalle.images import load_image, sheet, shorter_side, to_pil, to_pixels
from dalle.models import Part, load_part, save_weights, weights_hash
from dalle.rerank import rank
from dalle.sampling import check_sampling, uniforms
from dalle.text import MergeTokenizer, load_text, text_from_dict
from dalle.train.checkpoint import FORMAT, check_meta
from dalle.transformer import Transformer
from dalle.transformer.generate import draw_tokens
from dalle.types import ImageTokenizer, Scorer


@dataclass
class Generation:
    """Pictures of one prompt, best first; shows itself in a notebook."""

    prompt: str
    seed: int
    images: list[Image.Image]
    scores: list[float] | None
    image_tokens: Tensor
    candidates: list[int]
    """Which candidate each picture is: with the seed it names the picture for good."""

    def grid(self, columns: int = 4) -> Image.Image:
        """All pictures on one sheet, row by row."""
        rows = [self.images[i : i + columns] for i in range(0, len(self.images), columns)]
        return sheet(rows, scale=max(1, 256 // self.images[0].width))

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.grid().save(buffer, format="PNG")
        return buffer.getvalue()


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

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.to_logits.weight.device

    def generate(
        self,
        prompt: str,
        n: int = 4,
        best_of: int = 64,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        truncate: bool = False,
        chunk: int = 64,
        progress: bool = True,
    ) -> Generation:
        """Draws `best_of` candidates for a caption and keeps the n that the scorer ranks highest.

        Args:
            prompt: the caption.
            n: pictures to keep.
            best_of: candidates to draw; the paper draws 512.
            seed: with the prompt and a candidate's number it fixes that candidate's random numbers.
            temperature: 1 as the paper; 0 takes the most likely tokens.
            top_k, top_p: draw among the likeliest tokens only.
            guidance: strength of classifier-free guidance; needs a model trained with caption dropout.
            truncate: cut a caption that is too long instead of refusing it.
            chunk: candidates drawn at once; bounds the memory.
            progress: show a bar.

        Raises:
            ValueError: an empty or too long prompt, best_of < n, settings out of range.
        """
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        text = self._text_tokens(prompt, truncate)
        return self._ranked(prompt, text, None, n, best_of, seed, chunk, progress, options)

    def complete(
        self, prompt: str, image: Image.Image | Path | str, rows: int, n: int = 4, best_of: int = 64, seed: int = 0,
        temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        guidance: float | None = None, truncate: bool = False, chunk: int = 64, progress: bool = True,
    ) -> Generation:  # fmt: skip
        """As `generate`, keeping the top rows of tokens of a picture (section 3.3).

        Args:
            image: the picture; its middle square is resized to the model's size.
            rows: rows of tokens to keep, 1 to the grid's rows - 1.
        """
        layout = self.transformer.layout
        if not 0 < rows < layout.rows:
            raise ValueError(f"rows must be 1 to {layout.rows - 1}, got {rows}")
        if layout.rows != layout.columns:
            raise ValueError(f"complete needs a square grid, the model's is {layout.rows} x {layout.columns}")
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        text = self._text_tokens(prompt, truncate)
        square = shorter_side(load_image(image), layout.rows * self.dvae.downsampling)
        tokens = self.dvae.encode(to_pixels([square]).to(self.device))
        prefix = tokens[:, : rows * layout.columns]
        return self._ranked(prompt, text, prefix, n, best_of, seed, chunk, progress, options)

    def stream(
        self, prompt: str, n: int = 1, seed: int = 0, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, guidance: float | None = None, truncate: bool = False,
    ) -> Iterator[list[Image.Image]]:  # fmt: skip
        """Yields n pictures after each row of tokens, grey where nothing is drawn yet; unranked."""
        _check_counts(n, n, n)
        check_sampling(temperature, top_k, top_p, guidance)
        layout = self.transformer.layout
        text = self._text_tokens(prompt, truncate)
        noise = uniforms(seed, prompt, range(n), layout.image_len)[None]
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        for tokens in draw_tokens(self.transformer, text, noise, **options):
            if tokens.shape[2] % layout.columns == 0:
                yield to_pil(self._partial(tokens[0]))

    def save_pretrained(self, directory: Path | str) -> None:
        """Writes a model directory: config.json, text.json and a safetensors file a part.

        Raises:
            ValueError: an image tokenizer or scorer that is not one of the library's own models, or a
                directory that cannot be made.
        """
        directory = Path(directory)
        parts: dict[str, torch.nn.Module] = {"dvae": self.dvae, "transformer": self.transformer}
        if self.scorer is not None:
            parts["clip"] = getattr(self.scorer, "model", None)
        for kind, expected in (("dvae", DVAE), ("clip", CLIP)):
            if kind in parts and not isinstance(parts[kind], expected):
                raise ValueError(f"only a {expected.__name__} of this library can be saved as {kind}; save it yourself")
        make_directory(directory)
        links = {"text": self.text.hash, "dvae": weights_hash(self.dvae)}
        for kind, model in parts.items():
            save_weights(model, directory / f"{kind}.safetensors")
        self.text.save(directory / "text.json")
        described = {kind: {"config": to_dict(model.config)} for kind, model in parts.items()}
        write_json(
            directory / "config.json",
            {"format": FORMAT, "kind": "dalle", "hash": self.hash, "links": links, "parts": described},
        )

    @classmethod
    def from_pretrained(cls, directory: Path | str, device: str | torch.device = "cpu") -> "DALLE":
        """Opens a model directory written by `save_pretrained`. Nothing is downloaded.

        Raises:
            ValueError: no such directory, a damaged file, or parts that do not belong together.
        """
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise ValueError(
                f"{directory} is no model directory (it has no config.json); make one with save_pretrained"
            )
        config = read_json(directory / "config.json")
        check_meta(config, "dalle", directory)
        if missing := {"hash", "links", "parts"} - config.keys():
            raise ValueError(f"{directory / 'config.json'} lacks {', '.join(sorted(missing))}; it is damaged")
        text = load_text(directory / "text.json")
        kinds = ["dvae", "transformer"] + ["clip"] * ("clip" in config["parts"])
        loaded = {kind: load_part(directory, kind, device).model for kind in kinds}
        scorer = CLIPScorer(loaded["clip"], text) if "clip" in loaded else None
        model = cls(loaded["dvae"], loaded["transformer"], text, scorer)
        found = {"text": text.hash, "dvae": weights_hash(model.dvae)}
        if found != config["links"]:
            raise ValueError(f"{directory}: the files do not belong together: {found}, expected {config['links']}")
        if model.hash != config["hash"]:
            raise ValueError(f"{directory}: the weights have hash {model.hash}, expected {config['hash']}")
        return model

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
        clip = getattr(self.scorer, "model", None)
        models = [self.dvae, self.transformer] + [clip] * isinstance(clip, CLIP)
        return "-".join(weights_hash(model) for model in models)

    def text_tokens(self, prompts: Sequence[str], truncate: bool = False) -> Tensor:
        """Captions -> int64 (len(prompts), T); ValueError for an empty or too long one."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"the prompt must be text, got {type(prompt).__name__}")
        ids = [self.text.encode(prompt) for prompt in prompts]
        if not all(ids):
            raise ValueError("the prompt is empty; say what the picture shall show")
        return self.transformer.layout.pad_text(ids, truncate).to(self.device)

    def _text_tokens(self, prompt: str, truncate: bool) -> Tensor:
        return self.text_tokens([prompt], truncate)

    def _ranked(self, prompt, text, prefix, n, best_of, seed, chunk, progress, options) -> Generation:
        _check_counts(n, best_of, chunk)
        check_sampling(**options)
        if self.scorer is None and best_of > n:
            warnings.warn(f"this model has no scorer: drawing {n} pictures, unranked", stacklevel=3)
            best_of = n
        tokens = self._draw(prompt, text, prefix, best_of, seed, chunk, progress, options)
        pixels = torch.cat([self.decode(part) for part in tokens.split(chunk)])
        order, scores = torch.arange(best_of), None
        if self.scorer is not None:
            order, ranked = rank(self.scorer, pixels, prompt, chunk)
            scores = ranked[:n].tolist()
        kept = order[:n]
        return Generation(
            prompt, seed, to_pil(pixels[kept]), scores, tokens[kept.to(tokens.device)].cpu(), kept.tolist()
        )

    def _draw(self, prompt, text, prefix, count, seed, chunk, progress, options) -> Tensor:
        """Image tokens int64 (count, h * w) of candidates 0 .. count - 1, `chunk` at a time."""
        slots = self.transformer.layout.image_len
        kept = 0 if prefix is None else prefix.shape[1]
        parts = []
        starts = range(0, count, chunk)
        with tqdm(
            total=(slots - kept) * len(starts), desc="drawing", unit="token", disable=None if progress else True
        ) as bar:
            for i, start in enumerate(starts):
                noise = uniforms(seed, prompt, range(start, min(start + chunk, count)), slots)[None]
                for tokens in draw_tokens(self.transformer, text, noise, prefix, **options):
                    bar.update(i * (slots - kept) + tokens.shape[2] - kept - bar.n)
                parts.append(tokens[0].clone())
        return torch.cat(parts)

    def decode(self, tokens: Tensor) -> Tensor:
        """Image tokens int64 (N, h * w) -> pixels (N, 3, H, W) in [0, 1]."""
        return self.dvae.decode(tokens, self.transformer.layout.grid)

    def _partial(self, tokens: Tensor) -> Tensor:
        """Pictures of whole rows of tokens (N, r * w), grey below them."""
        layout = self.transformer.layout
        drawn = self.dvae.decode(tokens.clone(), (tokens.shape[1] // layout.columns, layout.columns))
        height = layout.rows * self.dvae.downsampling
        return torch.nn.functional.pad(drawn, (0, 0, 0, height - drawn.shape[2]), value=0.5)


def _check_counts(n: int, best_of: int, chunk: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if best_of < n:
        raise ValueError(f"best_of must be at least n, got best_of={best_of}, n={n}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")

"""Candidates in blocks: drawn, decoded, scored, and all but the best forgotten (paper section 2.6: best of 512).

The last bits of a matrix product depend on how many rows it has, and so may a token that is drawn by them. So a
block always has the same number of rows, `SamplingConfig.batch`, and of captions, `SamplingConfig.together`: candidates
k n .. (k + 1) n of each caption are drawn together even if fewer are wanted. What is drawn for a caption depends on
model, caption, seed and settings alone, whatever the number of candidates, the order, or the process that draws it.
Where `together` is not given, captions of which few candidates are wanted share a block, and the number of candidates
is then among what the last bits depend on.

    C captions in a block, n candidates of each, C n = batch; N image slots, T text slots
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dalle.io.images import to_pil
from dalle.layout import TokenLayout
from dalle.nn.int8 import weight_like
from dalle.pipelines.generation import Generation
from dalle.pipelines.rerank import TopN
from dalle.sampling import candidate_noise, check_sampling
from dalle.transformer import Transformer
from dalle.transformer.generate import TO_GENERATE, generate_tokens
from dalle.transformer.sizes import cache_bytes
from dalle.types import ImageTokenizer, Scorer

ROWS = {"cpu": 16}  # of a block unless given; a CPU gains little by more
OTHER_ROWS = 64
FREE_SHARE = 0.8  # of the free memory that caches may take
BYTES_PER_PIXEL = 8192  # of the paper's dVAE at work: eight arrays of 256 channels in fp32


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = 1.0
    """1 as the paper; 0 takes the most likely tokens."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens that reach this probability only."""
    guidance: float | None = None
    """s in unconditional + s (conditional - unconditional) logits; needs a model trained with caption dropout."""
    batch: int | None = None
    """Rows of every step; with model, device and number format it settles the last bits, and so rarely a token.
    16 on a CPU and 64 elsewhere, or half, a quarter, ... of that where memory is short, unless given."""
    together: int | None = None
    """Captions in a block; as many as fit with all their candidates unless given. With `batch` it settles the last
    bits: 1 draws the same images for any number of candidates and captions."""
    chunk: int | None = None
    """Images decoded and scored at once; as many as half of the free memory holds unless given."""
    share: tuple[int, int] = (0, 1)
    """(i, k) draws only every k-th block, from the i-th: one of k processes that draw for the same caption."""
    graph: bool = False
    """On CUDA, record a step as one graph of kernels and replay it."""
    compile: bool = False
    """Compile a step by torch.compile: half a minute or more at first, so it pays for many candidates."""

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p, self.guidance)
        for name in ("batch", "chunk", "together"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.share[0] < self.share[1]:
            raise ValueError(f"share must be (i, k) with i from 0 to k - 1, got {self.share}")

    def options(self) -> dict:
        """What `generate_tokens` takes."""
        return {
            name: getattr(self, name)
            for name in ("temperature", "top_k", "top_p", "guidance", "graph", "compile")
        }


@dataclass
class CandidateBatch:
    """Captions by number and the candidates of each that are drawn together; `wanted` of them are kept."""

    captions: list[int]
    candidates: range
    wanted: int

    @property
    def count(self) -> int:
        """Candidates that are kept, of all its captions."""
        return len(set(self.captions)) * self.wanted


def blocks(captions: int, best_of: int, batch: int, together: int | None = None) -> Iterator[CandidateBatch]:
    """The blocks that hold candidates 0 .. best_of of each caption, all of one shape.

    Captions share a block, `together` of them; unless it is given, where two or more fit with all their candidates.
    The last block is filled up by its last caption.

    Raises:
        ValueError: more captions than rows.
    """
    count = 1 if captions == 1 and together is None else captions_of_a_block(best_of, batch, together)
    each = best_of if together is None and count > 1 else batch // count
    for start in range(0, captions, count):
        numbers = list(range(start, min(start + count, captions)))
        numbers += numbers[-1:] * (count - len(numbers))
        for first in range(0, best_of, each):
            yield CandidateBatch(numbers, range(first, first + each), min(each, best_of - first))


def captions_of_a_block(best_of: int, batch: int, together: int | None) -> int:
    """How many of several captions share a block: `together`, or as many as fit with all their candidates.

    Raises:
        ValueError: more captions than rows.
    """
    if together is not None and together > batch:
        raise ValueError(f"together must be at most the {batch} rows of a step, got {together}; raise batch")
    return together or max(1, batch // best_of)


@dataclass
class GenerationProgress:
    """Where the drawing for a prompt stands: after each row of tokens, and once more when a block is ranked."""

    candidates: range
    """Those that are drawn together just now."""
    best_of: int
    """Candidates to draw in all."""
    image_tokens: Tensor
    """int64 (k, drawn): the first k of them as far as they are drawn, k at most the images asked for."""
    images: list[Image.Image]
    """These k as images, grey where nothing is drawn yet."""
    generation: Generation | None
    """When the block is ranked: the best so far; the last one is what `DALLE.generate` gives."""


def partial_images(dvae: ImageTokenizer, layout: TokenLayout, tokens: Tensor) -> list[Image.Image]:
    """Images of whole rows of tokens (N, r * w), grey below them."""
    drawn = dvae.decode(tokens.clone(), (tokens.shape[1] // layout.columns, layout.columns))
    side = drawn.shape[3] // layout.columns  # of a token
    below = layout.rows * side - drawn.shape[2]
    return to_pil(torch.nn.functional.pad(drawn, (0, 0, 0, below), value=0.5))


@dataclass
class CandidateSampler:
    """The parts that turn text tokens into ranked images."""

    dvae: ImageTokenizer
    transformer: Transformer
    scorer: Scorer | None
    settings: SamplingConfig
    batch: int = field(init=False)

    def __post_init__(self):
        guided = self.settings.guidance not in (None, 1)
        self.batch = self.settings.batch or auto_batch_size(self.transformer, 2 if guided else 1)

    def tokens(
        self, prompts: Sequence[str], text: Tensor, prefix: Tensor | None, seed: int, block: CandidateBatch
    ):
        """Image tokens of a block, (C, n, drawn) after each slot: text (captions, T), prefix (captions, N)."""
        layout, numbers = self.transformer.layout, torch.tensor(block.captions, device=text.device)
        noise = torch.stack(
            [
                candidate_noise(seed, prompts[i], block.candidates, layout.num_image_tokens)
                for i in block.captions
            ]
        )
        kept = None if prefix is None else prefix[numbers]
        return generate_tokens(self.transformer, text[numbers], noise, kept, **self.settings.options())

    def share(self, captions: int, best_of: int) -> list[CandidateBatch]:
        """The blocks that are ours (`SamplingConfig.share`)."""
        every = list(blocks(captions, best_of, self.batch, self.settings.together))
        return every[self.settings.share[0] :: self.settings.share[1]]

    def steps(
        self,
        prompts: Sequence[str],
        text: Tensor,
        prefix: Tensor | None,
        seed: int,
        mine: Sequence[CandidateBatch],
        best: list[TopN],
    ) -> Iterator[tuple[CandidateBatch, Tensor, bool]]:
        """Draws blocks and ranks them into `best`.

        Yields after each slot (block, its tokens so far, False), and once more with True when it is ranked.
        """
        for block in mine:
            for tokens in self.tokens(prompts, text, prefix, seed, block):
                yield block, tokens, False
            self._take(best, block, tokens)
            yield block, tokens, True

    def watched(
        self, prompt: str, text: Tensor, prefix: Tensor | None, n: int, best_of: int, seed: int
    ) -> Iterator[GenerationProgress]:
        """The n best of best_of candidates of a prompt, seen after each row of tokens and each block."""
        best, layout = TopN(n, prompt, self.scorer), self.transformer.layout
        for block, tokens, whole in self.steps([prompt], text, prefix, seed, self.share(1, best_of), [best]):
            if whole or tokens.shape[2] % layout.columns == 0:
                shown = tokens[0, : min(n, block.wanted)].clone()
                ranked = self._generation(best, seed, best_of) if whole else None
                candidates = block.candidates[: block.wanted]
                yield GenerationProgress(
                    candidates, best_of, shown, partial_images(self.dvae, layout, shown), ranked
                )

    def ranked(
        self,
        prompts: Sequence[str],
        text: Tensor,
        prefix: Tensor | None,
        n: int,
        best_of: int,
        seed: int,
        progress: bool,
    ) -> list[Generation]:
        """The n best of best_of candidates of each prompt.

        Interrupted (Control-C), it gives what is ranked so far and says so; prompts without any image are left
        out, and if none has one the interruption goes on.
        """
        best = [TopN(n, prompt, self.scorer) for prompt in prompts]
        slots = self.transformer.layout.num_image_tokens
        open_slots = slots if prefix is None else int((prefix[0] == TO_GENERATE).sum())
        mine = self.share(len(prompts), best_of)
        count = sum(block.count for block in mine)
        bar = tqdm(
            total=count * open_slots,
            desc="drawing",
            unit="token",
            unit_scale=True,
            disable=None if progress else True,
        )
        try:
            with bar:
                for block, tokens, whole in self.steps(prompts, text, prefix, seed, mine, best):
                    if whole:
                        bar.set_postfix_str(f"{sum(one.seen for one in best)} of {count} candidates")
                    else:
                        bar.update(block.count * (tokens.shape[2] > slots - open_slots))
        except KeyboardInterrupt:
            seen = sum(one.seen for one in best)
            if not seen:
                raise
            warnings.warn(f"interrupted: {seen} of {count} candidates are ranked", stacklevel=4)
        return [self._generation(one, seed, best_of) for one in best if one.seen]

    def _take(self, best: list[TopN], block: CandidateBatch, tokens: Tensor) -> None:
        """Decodes and ranks a block, some images at a time."""
        layout = self.transformer.layout
        chunk = self.settings.chunk or fitting_chunk(
            tokens.device, layout.num_image_tokens * self.dvae.downsample_factor**2
        )
        for i, caption in enumerate(dict.fromkeys(block.captions)):
            for start in range(0, block.wanted, chunk):
                part = tokens[i, start : min(start + chunk, block.wanted)].clone()
                best[caption].add(part, self.dvae.decode(part, layout.grid), block.candidates[start])

    def _generation(self, best: TopN, seed: int, best_of: int) -> Generation:
        scores, candidates, tokens, pixels = zip(*best.kept, strict=True)
        return Generation(
            best.caption,
            seed,
            to_pil(torch.stack(pixels)),
            None if self.scorer is None else list(scores),
            torch.stack(tokens),
            list(candidates),
            best.seen,
            best_of,
        )


def auto_batch_size(model: Transformer, streams: int = 1) -> int:
    """Rows of a block: a power of two, at most 16 on a CPU and 64 elsewhere, whose caches fit the free memory."""
    device = weight_like(model.to_logits).device
    rows = ROWS.get(device.type, OTHER_ROWS)
    if isinstance(model, Transformer):
        _, each = cache_bytes(model.config, weight_like(model.layers[0].attention.f.qkv).itemsize)
    else:  # a transformer of others, see dalle/pretrained/external_transformer.py
        each = model.kv_bytes_per_sample()
    free = free_memory(device)
    while free is not None and rows > 1 and rows * streams * each > FREE_SHARE * free:
        rows //= 2
    return rows


def fitting_chunk(device: torch.device, pixels: int) -> int:
    """Images of so many pixels that half of the free memory decodes at once, 64 at most."""
    free = free_memory(device)
    return 64 if free is None else max(1, min(64, int(free / 2 / (pixels * BYTES_PER_PIXEL))))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be taken on a device; None where it does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def open_corner(grid: tuple[int, int], rows: int | None, box: tuple[int, int] | None) -> tuple[int, int]:
    """Where what is drawn anew begins, (top, left), if `rows` are kept or all outside of `box`."""
    if (rows is None) == (box is None):
        raise ValueError("give rows, how many to keep, or box, (top, left) of what is drawn anew")
    if rows is not None and not 0 < rows < grid[0]:
        raise ValueError(f"rows must be 1 to {grid[0] - 1}, got {rows}")
    top, left = (rows, 0) if box is None else box
    if not (0 <= top < grid[0] and 0 <= left < grid[1]) or (top, left) == (0, 0):
        raise ValueError(f"box must be (top, left) within {grid[0]} x {grid[1]} and not (0, 0), got {box}")
    return top, left


def check_counts(n: int, best_of: int) -> None:
    """ValueError for numbers of images that mean nothing."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if best_of < n:
        raise ValueError(f"best_of must be at least n, got best_of={best_of}, n={n}")

"""Best of N: candidates generated in batches, decoded and scored; only the best are kept (2.6).

The last bits of a matrix product depend on its number of rows, and so may a token. A batch therefore always
has the same shape, `batch_size` rows of `prompts_per_batch` prompts, even if fewer candidates are wanted:
what is generated for a prompt depends on model, prompt, seed and settings alone, whatever the number of
candidates, their order, or the process. Where `prompts_per_batch` is not set, prompts with few candidates
share a batch, and the number of candidates is then among what the last bits depend on.

    C prompts in a batch, n candidates of each, C n = batch_size; N image positions
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle.io.images import to_pil
from dalle.pipelines.generation import Generation
from dalle.sampling import SamplingConfig, candidate_noise
from dalle.transformer import Transformer
from dalle.transformer.generate import decode_step_of, generate_tokens
from dalle.types import Scorer

CACHE_SHARE = 0.8  # of the free memory
MAX_ROWS = 512  # the paper's candidates
DECODE_BYTES_PER_PIXEL = 8192  # while the paper's dVAE decodes: eight arrays of 256 channels in fp32


@dataclass
class TopN:
    """The n best of a prompt's candidates so far; the others are dropped, so memory does not grow."""

    n: int
    """How many to keep; the first n where there is no scorer."""
    prompt: str
    """What they are ranked by."""
    scorer: Scorer | None
    seed: int
    best_of: int
    seen: int = 0
    """Candidates ranked so far."""
    best: list[tuple[float, int, Tensor, Tensor]] = field(default_factory=list)
    """(score, candidate, tokens, pixels), best first; equal scores in the order of the candidates."""

    @torch.no_grad()
    def add(self, tokens: Tensor, pixels: Tensor, first: int) -> None:
        """Ranks the next candidates, numbered from `first`: tokens (N, h * w), pixels (N, 3, H, W)."""
        scores = torch.zeros(len(tokens))
        if self.scorer is not None:
            scores = self.scorer.score(pixels, self.prompt).float().cpu()
            if not torch.isfinite(scores).all():
                raise ValueError(f"the scorer returned a score that is not finite for {self.prompt!r}")
        order = torch.sort(scores, descending=True, stable=True).indices[: self.n].tolist()
        new = [(float(scores[i]), first + i, tokens[i].cpu(), pixels[i].cpu()) for i in order]
        self.best = sorted(self.best + new, key=lambda one: (-one[0], one[1]))[: self.n]
        self.seen += len(tokens)

    def generation(self) -> Generation:
        """The best so far, at least one."""
        scores, candidates, tokens, pixels = zip(*self.best, strict=True)
        return Generation(
            self.prompt,
            self.seed,
            to_pil(torch.stack(pixels)),
            None if self.scorer is None else list(scores),
            torch.stack(tokens),
            list(candidates),
            self.seen,
            self.best_of,
        )


@dataclass
class CandidateBatch:
    """Indices of prompts and the candidates of each generated together; the first `wanted` are kept."""

    prompts: list[int]
    candidates: range
    wanted: int


def candidate_batches(
    prompts: int, best_of: int, batch_size: int, prompts_per_batch: int | None = None
) -> Iterator[CandidateBatch]:
    """Batches of one shape with candidates 0 .. best_of of each prompt; the last prompt fills the last."""
    per_batch = 1
    if prompts > 1 or prompts_per_batch:
        per_batch = num_prompts_per_batch(best_of, batch_size, prompts_per_batch)
    each = best_of if per_batch > 1 and not prompts_per_batch else batch_size // per_batch
    for start in range(0, prompts, per_batch):
        indices = [min(i, prompts - 1) for i in range(start, start + per_batch)]
        for first in range(0, best_of, each):
            wanted = min(each, best_of - first)
            yield CandidateBatch(indices, range(first, first + each), wanted)


def num_prompts_per_batch(best_of: int, batch_size: int, prompts_per_batch: int | None) -> int:
    """Prompts that share a batch: as configured, or as many as fit with all their candidates."""
    if prompts_per_batch is not None and prompts_per_batch > batch_size:
        raise ValueError(
            f"prompts_per_batch must be at most {batch_size}, got {prompts_per_batch}; raise batch_size"
        )
    return prompts_per_batch or max(1, batch_size // best_of)


@dataclass
class GenerationProgress:
    """State of the sampling, after each token and once more when a batch is ranked."""

    model: Any
    batch: CandidateBatch
    tokens: Tensor
    """int64 (C, n, t), a view that later tokens extend."""
    ranked: bool
    """The batch is decoded and in `top`."""
    top: list[TopN]
    """The best candidates of each prompt so far."""
    seen: int
    """Candidates ranked so far, of all prompts."""
    total: int
    """Candidates of all prompts."""

    unit = "image"

    @property
    def done(self) -> tuple[int, int]:
        """For a progress bar, in `unit`: how much is done, of how much."""
        return self.seen, self.total

    @property
    def has_images(self) -> bool:
        """Whether a row of tokens has just been completed."""
        return not self.ranked and self.tokens.shape[2] % self.model.transformer.layout.columns == 0

    @property
    def images(self) -> list[Image.Image]:
        """The first prompt's candidates of this batch, at most n, from complete rows; gray below."""
        layout = self.model.transformer.layout
        tokens = self.tokens[0, : min(self.top[0].n, self.batch.wanted)].clone()
        pixels = self.model.dvae.decode(tokens, (tokens.shape[1] // layout.columns, layout.columns))
        height = pixels.shape[3] // layout.columns * layout.rows
        return to_pil(torch.nn.functional.pad(pixels, (0, 0, 0, height - pixels.shape[2]), value=0.5))


Callback = Callable[[GenerationProgress], None]


def sample_best_of_n(
    model: Any,
    prompts: Sequence[str],
    n: int,
    best_of: int,
    seed: int,
    sampling: SamplingConfig,
    text_tokens: Tensor,
    prefix: Tensor | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[GenerationProgress]:
    """Generates, decodes and ranks the candidates of each prompt; the last state has the result.

    Args:
        model: a `dalle.pipelines.dalle.DALLE`; its `.transformer`, `.dvae` and `.scorer` are used.
        prompts, n, best_of, seed: as `DALLE.generate`.
        sampling: settings.
        text_tokens: int64 (len(prompts), T), the prompts.
        prefix: int64 (1, N), image tokens to keep, TO_GENERATE elsewhere.
        shard: (rank, world size): every world-size-th batch from the rank-th, for processes that share the
            work.

    Yields:
        the state after each token, and once more after each batch is ranked.
    """
    transformer, layout = model.transformer, model.transformer.layout
    top = [TopN(n, prompt, model.scorer, seed, best_of) for prompt in prompts]
    rows = model.auto_batch_size(sampling, best_of // shard[1])
    decode_rows = sampling.decode_batch_size
    if decode_rows is None:
        image_bytes = layout.num_image_tokens * model.dvae.downsample_factor**2 * DECODE_BYTES_PER_PIXEL
        free = free_memory(text_tokens.device)
        decode_rows = 64 if free is None else max(1, min(64, int(free / 2 / image_bytes)))
    names = ("temperature", "top_k", "top_p", "min_p", "guidance")
    options = {name: getattr(sampling, name) for name in names}
    batches = list(candidate_batches(len(prompts), best_of, rows, sampling.prompts_per_batch))
    batches = batches[shard[0] :: shard[1]]
    seen, total = 0, sum(len(set(batch.prompts)) * batch.wanted for batch in batches)
    for batch in batches:
        length, candidates = layout.num_image_tokens, batch.candidates
        noise = [candidate_noise(seed, prompts[i], candidates, length) for i in batch.prompts]
        step = decode_step_of(transformer, sampling.compile, sampling.cuda_graph)
        known = None if prefix is None else prefix.expand(len(batch.prompts), -1)
        text = text_tokens[batch.prompts]
        for tokens in generate_tokens(transformer, text, torch.stack(noise), known, step=step, **options):
            yield GenerationProgress(model, batch, tokens, False, top, seen, total)
        for i, prompt in enumerate(dict.fromkeys(batch.prompts)):
            for start in range(0, batch.wanted, decode_rows):
                part = tokens[i, start : min(start + decode_rows, batch.wanted)].clone()
                top[prompt].add(part, model.dvae.decode(part, layout.grid), batch.candidates[start])
        seen = sum(one.seen for one in top)
        yield GenerationProgress(model, batch, tokens, True, top, seen, total)


def auto_batch_size(model: Transformer, guidance: float | None = None, best_of: int = 1) -> int:
    """Rows of a batch: 16 on a CPU, 64 elsewhere, halved until the KV caches fit the free memory.

    On CUDA, where more candidates are wanted of a prompt, the rows double to as many, or to MAX_ROWS: a step
    reads all weights, however many rows share it.
    """
    device = model.to_logits.weight.device
    each = sum(cache.image.nbytes for cache in model.init_kv_caches(1, 1, "meta"))
    rows = 16 if device.type == "cpu" else 64  # a CPU gains little by more
    while device.type == "cuda" and rows < min(best_of, MAX_ROWS):
        rows *= 2
    streams, free = 1 if guidance in (None, 1) else 2, free_memory(device)
    while free is not None and rows > 1 and rows * streams * each > CACHE_SHARE * free:
        rows //= 2
    return rows


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device, None where it is unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").split("\n")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)

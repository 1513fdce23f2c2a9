"""Sampling: its settings, seeded random numbers, and tokens from logits (temperature, top-k, top-p, min-p).

The random numbers of candidate i of a prompt depend on (seed, prompt, i, position) alone, in diffusion on
(seed, prompt, i, step), so it is the same image whatever the batch, the order or the number of candidates.
Importing it imports neither numpy nor torch.

    B batch, V vocabulary, n candidates, N positions
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, Literal

from dalle.config import check_positive, configuration, whole_number

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MIN_TEMPERATURE = 1e-30
"""Logits divided by less could overflow float32."""
MAX_GUIDANCE = 1e6
"""Logits scaled by more could overflow float32."""
MAX_COUNT = 2**20
"""Most candidates of a prompt, and rows of a batch; a typing error must not sample for years."""


@configuration
class SamplingConfig:
    """How image tokens are sampled."""

    temperature: float = 1.0
    """1 in the paper; 0 is greedy."""
    top_k: int | None = None
    """Sample among the k most likely tokens only."""
    top_p: float | None = None
    """Sample among the fewest most likely tokens whose probability reaches p, after temperature and top-k."""
    min_p: float | None = None
    """Sample among tokens at least p times as likely as the most likely one, of what top-k and top-p keep."""
    guidance: float | None = None
    """Scale of classifier-free guidance; needs a model trained with caption dropout."""
    batch_size: int | None = None
    """Candidates per decoding step; by default 16 on a CPU and 64 elsewhere, on CUDA up to 512 if as many are
    wanted; fewer where memory is short. The last bits of a logit, and so rarely a token, depend on it."""
    prompts_per_batch: int | None = None
    """Prompts that share a decoding step; by default as many as fit with all their candidates. A fixed number
    gives the same bits for any number of prompts and candidates."""
    decode_batch_size: int | None = None
    """Images decoded and scored at once; by default as many as half of the free memory holds."""
    cuda_graph: bool | None = None
    """Record a decoding step as a CUDA graph and replay it; by default wherever the model is on CUDA."""
    compile: bool = False
    """Compile the decoding step: half a minute or more at first, so it pays for many candidates."""

    def __post_init__(self):
        if not (self.temperature == 0 or self.temperature >= MIN_TEMPERATURE):
            raise ValueError(f"temperature must be 0 or at least {MIN_TEMPERATURE}, got {self.temperature}")
        if self.guidance is not None and not abs(self.guidance) <= MAX_GUIDANCE:
            raise ValueError(f"guidance must be at most {MAX_GUIDANCE:g} in magnitude, got {self.guidance}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        for name in ("top_k", "batch_size", "prompts_per_batch", "decode_batch_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_COUNT:
                raise ValueError(f"{name} must be at least 1 and at most {MAX_COUNT}, got {value}")


@configuration
class DiffusionSampling:
    """How images are sampled by diffusion; the defaults are those of GLIDE's release."""

    steps: int = 100
    """Steps of the base model, from 2 to those of its training."""
    guidance: float = 3.0
    """Scale of classifier-free guidance; 1 is none. It needs a model trained with caption dropout."""
    sampler: Literal["ancestral", "ddim", "dpm"] = "ancestral"
    """Of the base model: ancestral (DDPM), DDIM, or DPM-Solver++(2M), which needs the fewest steps."""
    clip_guidance: float | None = None
    """Scale of guidance by a scorer that was trained on noised images; with it take guidance 1."""
    upsample_steps: str = "fast27"
    """Steps of the upsampler, by DDIM: a number, or another spacing of `dalle.diffusion.schedule.respace`."""
    upsample_temperature: float = 0.997
    """Factor on the noise that the upsampler starts from; 1 is sharper, and sometimes grainy."""
    batch_size: int | None = None
    """Candidates per step; by default as many as make 128 x 128 pixels on a CPU, 1024 x 1024 elsewhere, 64 at
    most, fewer where memory is short. The last bits of an image depend on it."""
    prompts_per_batch: int | None = None
    """Prompts that share a step; by default as many as fit with all their candidates. A fixed number gives
    the same bits for any number of prompts and candidates."""

    def __post_init__(self):
        for name in ("guidance", "clip_guidance"):
            if abs(value := getattr(self, name) or 0) > MAX_GUIDANCE:
                raise ValueError(f"{name} must be at most {MAX_GUIDANCE:g} in magnitude, got {value}")
        if not 0 < self.upsample_temperature <= 10:
            raise ValueError(f"upsample_temperature must be in (0, 10], got {self.upsample_temperature}")
        check_positive(self, "batch_size", "prompts_per_batch")


def whole_numbers(**values: Any) -> list[int]:
    """The values as ints; ValueError names the first that is no whole number."""
    numbers = list(map(whole_number, values.values()))
    for name, number in zip(values, numbers, strict=True):
        if type(number) is not int:
            raise ValueError(f"{name} must be a whole number, got {number!r:.100}")
    return numbers


def generator(purpose: str, *key: int | str) -> np.random.Generator:
    """A generator for a purpose ("scene", "caption", ...) and a key; text comes last in a key.

    Philox is counter-based: a generator costs microseconds and has no state to save.
    """
    import numpy as np

    digest = hashlib.blake2b("\n".join([purpose, *map(str, key)]).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))


def candidate_noise(seed: int, prompt: str, candidates: range, positions: int) -> Tensor:
    """Random numbers of candidates of a prompt: float64 (n, positions) in [0, 1)."""
    import numpy as np
    import torch

    rows = [generator("candidate", seed, i, prompt).random(positions) for i in candidates]
    return torch.from_numpy(np.stack(rows))


def candidate_normals(seed: int, prompt: str, candidates: range, step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers of candidates of a prompt at a step of diffusion: float32 (n, *shape)."""
    import numpy as np
    import torch

    streams = [generator("normals", seed, i, step, prompt) for i in candidates]
    return torch.from_numpy(np.stack([stream.standard_normal(shape, np.float32) for stream in streams]))


def numbers_by_place(like: Tensor, first: int, normal: bool = False) -> Tensor:
    """Numbers in [0, 1), or standard normal ones, of a tensor's shape and device, for training.

    They follow from torch's seed and a row's place: row i is that of place first + i in any batch. One number
    is sampled by torch's own CPU generator; processes of the same seed and step so have the same.
    """
    import torch

    seed = int(torch.randint(2**62, (), device="cpu").numpy())
    numbers, rng = torch.empty(like.shape, device=like.device), torch.Generator(like.device)
    for place, row in enumerate(numbers, first):
        fill = row.normal_ if normal else row.uniform_
        fill(generator=rng.manual_seed(seed + place))
    return numbers


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Samples one id per row by inverting the cumulative distribution.

    The options apply in the order of the arguments, each to what the one before it leaves.

    Args:
        logits: (B, V); -inf is never sampled.
        uniform: (B,) in [0, 1); where its number format rounds to 1, the last id with mass is sampled.
        temperature: above 0, or 0 for the most likely id; `SamplingConfig` checks all four.
        top_k: keep the k most likely ids.
        top_p: keep the fewest most likely ids whose probability reaches p.
        min_p: keep the ids that are at least p times as likely as the most likely one.

    Returns:
        int64 (B,); V where the logits are not numbers.
    """
    import torch

    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, ids = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, values)
    if top_p is not None and top_p < 1:
        values, order = logits.sort(dim=-1, descending=True)
        probability = torch.softmax(values, dim=-1)
        outside = probability.cumsum(dim=-1) - probability >= top_p  # at least one stays
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    if min_p:
        least = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    probability, uniform = torch.softmax(logits, dim=-1), uniform.to(logits.device)
    return invert_cumulative(probability, uniform, whole=logits.device.type != "cpu")


def invert_cumulative(probability: Tensor, uniform: Tensor, whole: bool) -> Tensor:
    """The first id of each row at which the sum of the probabilities exceeds `uniform` of their total.

    Args:
        probability: fp32 (B, V), at least one above 0.
        uniform: (B,) in [0, 1]; 1 is the last id that has a probability.
        whole: add whole multiples of 2^-32, in any order, instead of float64. A GPU adds in parallel: its
            rounded sums of fp32 would also grow at ids without a probability. MPS has no float64.
    """
    import torch

    cumulative = ((probability * 2**32).long() if whole else probability.double()).cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    number = torch.float32 if whole else torch.float64
    target = (uniform.to(number)[:, None] * total.to(number)).to(total.dtype)
    last = torch.searchsorted(cumulative, total)
    ids = torch.searchsorted(cumulative, target, right=True).minimum(last)[:, 0]
    return ids.masked_fill(probability[:, 0].isnan(), probability.shape[1])

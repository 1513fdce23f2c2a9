"""Best of N by diffusion: candidates of a base model, upsampled, ranked (GLIDE, sections 2 and 4).

As in dalle/pipelines/best_of_n.py a step always has the same number of rows, so that a candidate has the same
bits for any number of candidates, their order, or the process. Its noise depends on (seed, prompt, candidate,
time) alone, so that another number of steps starts from the same x_T.

    C prompts in a batch, n candidates of each, B = C n rows; T text positions, D their width
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle.diffusion.guidance import classifier_free_batched, clip_x0, keep_known, score_gradient
from dalle.diffusion.samplers import SamplerStep, ancestral, ddim, dpm_solver
from dalle.diffusion.schedule import Denoise, Denoised, Schedule, Steps
from dalle.io.images import to_pil
from dalle.pipelines.best_of_n import CACHE_SHARE, CandidateBatch, TopN, free_memory
from dalle.sampling import DiffusionSampling, candidate_normals
from dalle.train.precision import autocast
from dalle.unet import UNet
from dalle.unet.text import pack_text

MOST_ROWS = 64
PIXELS = {"cpu": 128**2}  # of the images of a batch; a CPU gains little by more
PIXELS_ELSEWHERE = 1024**2
MAPS = 24  # arrays of a level's first width that a U-Net holds at once, roughly
UPSAMPLER_NOISE = 2**16 + 1
"""Added to the times of the upsampler's noise, above every step of a base model."""


@dataclass(frozen=True)
class Known:
    """Pixels to keep, at the size of one U-Net."""

    pixels: Tensor
    """(1, 3, H, W) in [-1, 1]."""
    mask: Tensor
    """(1, 1, H, W), 1 where they are known."""


@dataclass(frozen=True)
class Stage:
    """One U-Net and how it is sampled."""

    unet: UNet
    schedule: Schedule
    sampler: str
    ids: Tensor | None
    """int64 (prompts, T), packed; None for a model that reads no text."""
    precision: str
    known: Known | None = None
    guidance: float = 1.0
    scorer: Any = None
    """Of CLIP guidance: `log_prob(caption)` is a function of noised images and times."""
    clip_guidance: float = 0.0
    temperature: float = 1.0
    first_time: int = 0

    def sample(
        self, batch: CandidateBatch, prompts: Sequence[str], seed: int, low: Tensor | None
    ) -> Iterator[SamplerStep]:
        """The steps for a batch of candidates; `low` are the images (B, 3, h, w) to upsample."""
        size, device = self.unet.config.image_size, next(self.unet.parameters()).device
        captions = [prompts[i] for i in batch.prompts]

        def normals(time: int) -> Tensor:
            key = (batch.candidates, self.first_time + time, (3, size, size))
            return torch.cat([candidate_normals(seed, one, *key) for one in captions]).to(device)

        denoise = self.denoiser(batch, captions, low)
        x = normals(self.unet.config.diffusion.steps) * self.temperature
        if self.sampler == "ancestral":
            return ancestral(denoise, x, self.schedule, lambda t: normals(int(self.schedule.times[t])))
        return {"ddim": ddim, "dpm": dpm_solver}[self.sampler](denoise, x, self.schedule)

    @torch.no_grad()
    def denoiser(self, batch: CandidateBatch, captions: Sequence[str], low: Tensor | None) -> Denoise:
        """The guided denoiser of B rows; text is encoded once."""
        each, known, conditions = len(batch.candidates), self.known, {}
        rows = each * len(captions)
        guided = self.guidance != 1
        if known is not None and self.unet.config.inpainting:
            conditions = {"known": known.pixels, "mask": known.mask}
        conditions = {name: value.expand(rows, -1, -1, -1) for name, value in conditions.items()}
        if low is not None:
            conditions["low_resolution"] = low
        if guided:
            conditions = {name: torch.cat([value, value]) for name, value in conditions.items()}
        if self.ids is not None:
            ids = self.ids[batch.prompts]
            empty = pack_text([[]], ids.shape[1], self.unet.config.text_vocab).to(ids.device)
            with autocast(self.precision, ids.device):
                text = self.unet.encode_text(torch.cat([ids, empty])).float()  # (C + 1, T, D)
            counts = [each] * len(captions) + [rows if guided else 0]
            conditions["text"] = text.repeat_interleave(torch.tensor(counts, device=text.device), dim=0)
        denoise = partial(self._in_precision, self.unet.denoiser(self.schedule, **conditions))
        if guided:
            denoise = classifier_free_batched(denoise, self.guidance)
        denoise = clip_x0(denoise, self.schedule)
        if self.clip_guidance:
            shift = "mean" if self.sampler == "ancestral" else "noise"
            log_prob = self._log_prob(captions)
            denoise = score_gradient(denoise, log_prob, self.schedule, self.clip_guidance, shift)
        if known is not None:  # outermost, so that no guidance moves what is known
            denoise = keep_known(denoise, known.pixels, known.mask, self.schedule)
        return denoise

    def _in_precision(self, denoise: Denoise, xt: Tensor, t: Steps) -> Denoised:
        with autocast(self.precision, xt.device):
            return denoise(xt, t)

    def _log_prob(self, captions: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
        """Of noised images (B, 3, H, W) and their times: (B,), each by its own caption."""
        functions = [self.scorer.log_prob(caption) for caption in captions]

        def log_prob(x: Tensor, times: Tensor) -> Tensor:
            parts = zip(functions, x.chunk(len(functions)), times.chunk(len(functions)), strict=True)
            return torch.cat([one(rows, at) for one, rows, at in parts])

        return log_prob


@dataclass
class DiffusionProgress:
    """State of the sampling, after each step and once more when a batch is ranked."""

    batch: CandidateBatch
    x0: Tensor
    """(B, 3, H, W), about [-1, 1]: what the last step takes the images for."""
    done: tuple[int, int]
    """Steps of all batches that are done, of how many."""
    ranked: bool
    """The batch is in `top`."""
    top: list[TopN]
    """The best candidates of each prompt so far."""
    seen: int
    """Candidates ranked so far, of all prompts."""
    total: int
    """Candidates of all prompts."""
    unit = "step"

    @property
    def has_images(self) -> bool:
        """Whether there is a preview that the step before had not."""
        return not self.ranked

    @property
    def images(self) -> list[Image.Image]:
        """Previews of the first prompt's candidates of this batch, at most n."""
        return to_pil(eight_bits(self.x0[: min(self.top[0].n, self.batch.wanted)]) / 255)


def sample_by_diffusion(
    stages: Sequence[Stage],
    low: Tensor | None,
    prompts: Sequence[str],
    top: list[TopN],
    seed: int,
    batches: Sequence[CandidateBatch],
) -> Iterator[DiffusionProgress]:
    """Samples each batch by one stage after another and ranks it; the last state has the result.

    Args:
        stages: of which each but the first upsamples the images of the one before.
        low: image (1, 3, h, w) in [-1, 1] that the first one upsamples.
        top: of each prompt, to which candidates are added.
    """
    done, work = 0, len(batches) * sum(len(stage.schedule) for stage in stages)
    seen, total = 0, sum(len(set(batch.prompts)) * batch.wanted for batch in batches)
    for batch in batches:
        rows, images = len(batch.prompts) * len(batch.candidates), low
        for stage in stages:
            below = None if images is None else images.expand(rows, -1, -1, -1)
            for step in stage.sample(batch, prompts, seed, below):
                done += 1
                yield DiffusionProgress(batch, step.denoised.x0, (done, work), False, top, seen, total)
            values = eight_bits(step.x)
            images = values / 127.5 - 1
        pixels = (values / 255).unflatten(0, (len(batch.prompts), -1))
        for i, prompt in enumerate(dict.fromkeys(batch.prompts)):
            part = pixels[i, : batch.wanted]
            top[prompt].add(torch.empty(len(part), 0, dtype=torch.int64), part, batch.candidates[0])
        seen = sum(one.seen for one in top)
        yield DiffusionProgress(batch, images, (done, work), True, top, seen, total)


def eight_bits(x: Tensor) -> Tensor:
    """Images in [-1, 1], clipped, in the 256 values of a file: also what an upsampler reads (release)."""
    return (x.clamp(-1, 1) * 127.5 + 127.5).round()


def batch_size_for(units: Sequence[UNet], sampling: DiffusionSampling) -> int:
    """Rows of a batch, see `DiffusionSampling.batch_size`."""
    device, size = next(units[0].parameters()).device, max(unit.config.image_size for unit in units)
    rows = min(MOST_ROWS, max(1, PIXELS.get(device.type, PIXELS_ELSEWHERE) // size**2))
    need = [unit.config.image_size**2 * unit.config.widths[0] * 4 * MAPS for unit in units]
    need[0] *= 1 if sampling.guidance == 1 else 2
    free = free_memory(device)
    while free is not None and rows > 1 and rows * max(need) > CACHE_SHARE * free:
        rows //= 2
    return rows

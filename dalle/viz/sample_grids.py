"""Image grids logged during training, for held-out captions: samples, CLIP retrieval, and an evaluation of
diffusion.
"""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle.clip import CLIP
from dalle.diffusion import bits_per_dim, classifier_free, clip_x0, ddim, keep_known
from dalle.io.images import captioned_grid, image_grid, to_pil
from dalle.precision import cosines
from dalle.sampling import candidate_noise, numbers_by_place
from dalle.text import BPETokenizer
from dalle.transformer import Transformer
from dalle.transformer.generate import generate
from dalle.types import ImageTokenizer
from dalle.unet import UNet
from dalle.unet.objective import DiffusionObjective

SIDE = 160  # pixels of an image on a sheet, at least: room for its caption
SHOWN = 8  # images on a sheet of samples
GUIDANCE = 3.0  # GLIDE, section 5.1


class SampleGrid:
    """A grid of samples with the same random numbers each time, so that grids differ by the weights alone."""

    def __init__(self, tokenizer: ImageTokenizer, text: BPETokenizer, captions: list[str], seed: int):
        self.tokenizer, self.text, self.captions, self.seed = tokenizer, text, captions, seed

    def __call__(self, model: Transformer) -> Image.Image:
        """Samples at temperature 1, as in section 3."""
        layout = model.layout
        text_tokens = layout.pad_text([self.text.encode(caption) for caption in self.captions], truncate=True)
        count = layout.num_image_tokens
        noise = [candidate_noise(self.seed, caption, range(1), count) for caption in self.captions]
        tokens = generate(model, text_tokens.to(model.to_logits.weight.device), torch.stack(noise))[:, 0]
        images = to_pil(self.tokenizer.decode(tokens, layout.grid))
        cells = list(zip(self.captions, images, strict=True))
        return captioned_grid(cells, columns=4, scale=-(-SIDE // images[0].width))


def retrieval_grid(model: CLIP, pixels: Tensor, packed: Tensor, captions: list[str]) -> Image.Image:
    """The first captions, each with its own image at the left and the most similar of all at the right.

    pixels (N, 3, R, R) and packed text (N, L) are of N captions; `captions` are those to show.
    """
    found = cosines(model.encode_text(packed), model.encode_image(pixels)).argmax(dim=1)
    shown = range(min(8, len(captions)))
    own, best = to_pil(pixels[: len(shown)]), to_pil(pixels[found[: len(shown)]])
    scale = -(-SIDE // own[0].width)
    return captioned_grid([(captions[i], image_grid([[own[i], best[i]]], scale)) for i in shown], columns=4)


def evaluate_diffusion(
    model: UNet, objective: DiffusionObjective, batch: dict[str, Tensor], captions: list[str], steps: int
) -> dict[str, Any]:
    """Losses of a held-out batch, bits per dimension of its first images, and a grid of samples.

    Both are of a sampler of few steps; the grid is by DDIM, with classifier-free guidance of GLIDE's scale if
    captions were dropped. A sample stands between what it was given (a smaller image, known pixels) and the
    true image. All random numbers follow from torch's seed.
    """
    loss, config = objective(model, batch, 0), model.config
    x0, schedule = 2 * batch["pixels"][:SHOWN] - 1, model.schedule(str(steps))
    given = {name: value[:SHOWN] for name, value in batch.items() if name != "pixels"}
    if config.inpainting:
        given["known"] = x0
    denoise = model.denoiser(schedule, **given)
    bits = bits_per_dim(
        clip_x0(denoise, schedule), x0, schedule, lambda t: numbers_by_place(x0, 0, normal=True)
    )
    if config.text == "ids" and config.diffusion.caption_dropout:
        empty = given | {"text": torch.full_like(given["text"], config.text_vocab)}
        denoise = classifier_free(denoise, model.denoiser(schedule, **empty), GUIDANCE)
    columns = []
    if config.low_resolution:
        columns.append(F.interpolate(given["low_resolution"], x0.shape[2:]))
    if config.inpainting:
        columns.append(x0 * given["mask"])
        denoise = keep_known(denoise, x0, given["mask"], schedule)
    noise = numbers_by_place(x0, 0, normal=True)
    for sampled in ddim(clip_x0(denoise, schedule), noise, schedule):
        samples = sampled.x
    rows = zip(*(to_pil((1 + images).clamp(0, 2) / 2) for images in (*columns, samples, x0)), strict=True)
    scale = -(-SIDE // x0.shape[3])
    cells = [(caption, image_grid([row], scale)) for caption, row in zip(captions, rows, strict=False)]
    grid = captioned_grid(cells, columns=4)
    return {"loss": loss.total, **loss.metrics, "bits_per_dim": bits.mean(), "samples": grid}

"""Image grids logged during training: transformer samples, and CLIP retrieval, for held-out captions."""

import torch
from PIL import Image
from torch import Tensor

from dalle.clip import CLIP
from dalle.io.images import captioned_grid, image_grid, to_pil
from dalle.precision import cosines
from dalle.sampling import candidate_noise
from dalle.text import BPETokenizer
from dalle.transformer import Transformer
from dalle.transformer.generate import generate
from dalle.types import ImageTokenizer

SIDE = 160  # pixels of an image on a sheet, at least: room for its caption


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

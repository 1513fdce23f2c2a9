"""Codebook plots of an image tokenizer: codes decoded alone, usage, token maps, relaxed against hard codes.

B images, K codes, h w grid
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dalle.dvae import DVAE
from dalle.dvae.metrics import codebook_usage, dvae_scores
from dalle.io.images import captioned_grid, check_images, image_grid, to_pil
from dalle.layout import check_tokens, token_grid
from dalle.types import ImageTokenizer
from dalle.viz.curves import figure_image, label_axis


@torch.no_grad()
def decode_codebook(
    model: ImageTokenizer, codes: Sequence[int] | None = None, around: int = 4, batch: int = 64
) -> Tensor:
    """Each code decoded alone: the middle token of a grid filled with this code.

    `around` tokens on each side keep the image's edge out of the receptive field: 3 blocks_per_group (1 + 1/2
    + 1/4 ...), or 12 in the paper's dVAE. float32 (codes, 3, s, s) in [0, 1] on the CPU, s pixels per token.
    """
    chosen = torch.tensor(range(model.vocab_size) if codes is None else list(codes), dtype=torch.int64)
    if not len(chosen):
        raise ValueError("expected one code or more, got none")
    check_tokens(chosen[None], model.vocab_size, "codes")
    side, token = 2 * around + 1, model.downsample_factor
    middle = slice(around * token, (around + 1) * token)
    images = []
    for part in tqdm(chosen.split(batch), desc="codes", unit="batch", disable=None, leave=False):
        grids = part[:, None].expand(-1, side * side).to(next(model.parameters()).device)
        images.append(model.decode(grids, (side, side))[:, :, middle, middle].float().cpu())
    return torch.cat(images)


def plot_codebook(
    model: ImageTokenizer,
    codes: Sequence[int] | None = None,
    columns: int = 32,
    scale: int | None = None,
    around: int = 4,
) -> Image.Image:
    """`decode_codebook` as a grid, row by row; a code has 16 pixels or more a side without `scale`."""
    images = to_pil(decode_codebook(model, codes, around))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    return image_grid(rows, scale or -(-16 // model.downsample_factor), gap=2)


def code_colors(vocab_size: int) -> np.ndarray:
    """A distinct color for each code, uint8 (K, 3); consecutive codes are far apart in hue."""
    codes = np.arange(vocab_size)
    hue, saturation = codes * 0.6180339887 % 1, 0.55 + 0.2 * (codes % 3)  # steps of the golden ratio
    value = 0.95 - 0.225 * (codes // 3 % 3)
    return np.round(255 * hsv_to_rgb(np.stack([hue, saturation, value], axis=1))).astype(np.uint8)


def token_map(
    tokens: Tensor, vocab_size: int, grid: tuple[int, int] | None = None, cell: int = 16
) -> Image.Image:
    """The codes of one image, int64 (h * w) or (1, h * w), as cells of a color for each of the K codes.

    The grid (h, w) is square by default.
    """
    tokens = tokens.detach().cpu().view(1, -1)
    check_tokens(tokens, vocab_size, "tokens")
    height, width = token_grid(tokens, grid)
    image = Image.fromarray(code_colors(vocab_size)[tokens.view(height, width).numpy()])
    return image.resize((width * cell, height * cell), Image.Resampling.NEAREST)


@torch.no_grad()
def count_codes(model: ImageTokenizer, batches: Iterable[Tensor]) -> Tensor:
    """Uses of each code in batches of pixels (B, 3, H, W) in [0, 1]: int64 (K,)."""
    counts = torch.zeros(model.vocab_size, dtype=torch.int64)
    for pixels in batches:
        tokens = model.encode(pixels.to(next(model.parameters()).device)).flatten().cpu()
        counts += torch.bincount(tokens, minlength=model.vocab_size)
    return counts


def plot_code_usage(counts: Tensor) -> Image.Image:
    """Share of the tokens for each code (K,), most used first, and the perplexity exp(H) of the shares."""
    usage = codebook_usage(counts)
    shares = counts.double().sort(descending=True).values / counts.sum()
    figure = Figure(figsize=(5.4, 2.8), layout="constrained")
    axis = figure.subplots()
    ranks, label = range(1, len(counts) + 1), "share of the tokens"
    axis.step(ranks, shares.numpy(), where="mid", color="#2d6cb5", label=label)
    axis.axhline(1 / len(counts), linestyle=":", color="grey", label="uniform")
    if usage["codebook_used"] > 1:
        axis.set_yscale("log")
    title = f"{usage['codebook_used']} of {len(counts)} codes used, perplexity {usage['perplexity']:.1f}"
    label_axis(axis, title, "code, most used first")
    axis.legend(fontsize=7)
    return figure_image(figure)


@torch.no_grad()
def plot_reconstructions(model: DVAE, pixels: Tensor, tau: float = 1 / 16, seed: int = 0) -> Image.Image:
    """Images, their reconstructions from relaxed and from hard codes, and 4 times the difference of the two.

    `tau` is the temperature of the relaxed codes (A.2: 1/16 at the end of training), `seed` of the noise.
    """
    if not isinstance(model, DVAE):
        raise ValueError(f"relaxed codes need a DVAE, got {type(model).__name__}; use decode(encode(pixels))")
    check_images(pixels, model.downsample_factor)
    pixels = pixels.to(next(model.parameters()).device)
    with torch.random.fork_rng(devices=[]):  # Gumbel noise uses torch's global CPU generator
        torch.manual_seed(seed)
        _, relaxed, hard = dvae_scores(model, pixels, tau)
    difference = (4 * (relaxed - hard).abs()).clamp(0, 1)
    scale = max(1, 128 // pixels.shape[-1])
    names = ["image", f"relaxed, tau {tau:.3g}", "hard", "4 x their difference"]
    columns = zip(names, (pixels, relaxed, hard, difference), strict=True)
    cells = [(name, image_grid([[one] for one in to_pil(images)], scale)) for name, images in columns]
    return captioned_grid(cells, columns=4)

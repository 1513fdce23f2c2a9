"""The discrete VAE of DALLE-pytorch (lucidrains, 1.6.6), in vae.pt or inside dalle.pt.

Against ours: 4 x 4 convolutions with stride 2, residual blocks at the coarsest resolution, three output
channels (no log scale). Images are normalized by means and deviations of the hyper-parameters; the decoder's
normalized pixels are mapped back here.
"""

import math
import re
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor, nn

from dalle.config import configuration
from dalle.io.images import check_images
from dalle.layout import check_tokens, token_grid
from dalle.precision import tf32
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches

LICENSE = "MIT, of github.com/lucidrains/DALLE-pytorch; weights are of whoever trained them"
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # the package's default


@configuration
class DiscreteVAEConfig:
    """Shape of the VAE: `levels` halve the image, `blocks` are residual blocks on each side."""

    levels: int
    blocks: int
    width: int
    vocab_size: int
    codebook_dim: int
    means: tuple[float, ...]  # subtracted from each channel of an image
    deviations: tuple[float, ...]  # divisor of each channel


def infer_config(shapes: Shapes, found: DetectedCheckpoint) -> DiscreteVAEConfig:
    """Sizes from the shapes, the normalization from the file's hyper-parameters."""
    levels = sum(bool(re.fullmatch(r"encoder\.\d+\.0\.weight", name)) for name in shapes)
    blocks = count_matches(shapes, "encoder.*.net.0.weight")
    if not levels:
        raise ValueError("the encoder has no level")
    vocab_size, codebook_dim = shapes["codebook.weight"]
    sizes = levels, blocks, shapes["encoder.0.0.weight"][0], vocab_size, codebook_dim
    return DiscreteVAEConfig(*sizes, *_normalization(found.tree))


def _normalization(tree: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    hparams = tree.get("hparams") if isinstance(tree, dict) else None
    given = hparams.get("normalization", HALF) if isinstance(hparams, dict) else HALF
    if given is None:
        return (0.0,) * 3, (1.0,) * 3
    try:
        means, deviations = (tuple(map(float, values[:3])) for values in given)
        valid = len(means) == len(deviations) == 3 and all(0 < value < math.inf for value in deviations)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"a normalization of {shown(given):.80}; expected 3 means and 3 deviations")
    return means, deviations


class Block(nn.Module):
    """x + three convolutions."""

    def __init__(self, width: int):
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class DiscreteVAE(nn.Module):
    """An `ImageTokenizer` with the package's parameter names."""

    def __init__(self, config: DiscreteVAEConfig):
        super().__init__()
        self.config, width = config, config.width
        self.downsample_factor, self.vocab_size = 2**config.levels, config.vocab_size
        down, up = [], []
        for level in range(config.levels):
            n_in = width if level else 3
            down.append(nn.Sequential(nn.Conv2d(n_in, width, 4, stride=2, padding=1), nn.ReLU()))
            n_in = width if level or config.blocks else config.codebook_dim
            up.append(nn.Sequential(nn.ConvTranspose2d(n_in, width, 4, stride=2, padding=1), nn.ReLU()))
        before, after = ([Block(width) for _ in range(config.blocks)] for _ in range(2))
        if config.blocks:
            after = [nn.Conv2d(config.codebook_dim, width, 1), *after]
        self.codebook = nn.Embedding(config.vocab_size, config.codebook_dim)
        self.encoder = nn.Sequential(*down, *before, nn.Conv2d(width, config.vocab_size, 1))
        self.decoder = nn.Sequential(*after, *up, nn.Conv2d(width, 3, 1))

    @torch.no_grad()
    @tf32(False)
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], sides multiples of `downsample_factor` -> likeliest codes (B, h * w)."""
        check_images(pixels, self.downsample_factor)
        means, deviations = self._normalization(pixels)
        return self.encoder((pixels - means) / deviations).argmax(dim=1).flatten(1)

    @torch.no_grad()
    @tf32(False)
    def decode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """int64 (B, h * w), square unless `grid` is (h, w) -> float32 (B, 3, H, W) in [0, 1]."""
        check_tokens(tokens, self.vocab_size, "image_tokens")
        z = self.codebook(tokens).movedim(2, 1).unflatten(2, token_grid(tokens, grid))
        means, deviations = self._normalization(z)
        return (self.decoder(z) * deviations + means).float().clamp(0, 1)

    def _normalization(self, like: Tensor) -> list[Tensor]:
        values = (self.config.means, self.config.deviations)
        return [torch.tensor(v, device=like.device, dtype=like.dtype)[:, None, None] for v in values]


DISCRETE_VAE = CheckpointFormat(
    name="discrete VAE of DALLE-pytorch",
    kind="image tokenizer",
    license=LICENSE,
    key_patterns=("codebook.weight", "encoder.0.0.weight", "decoder.*.0.weight"),
    infer_config=infer_config,
    build=DiscreteVAE,
)

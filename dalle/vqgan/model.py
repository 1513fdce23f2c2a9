"""VQGAN (Esser et al. 2021, "Taming transformers"), to encode and decode images; module names of its release.

ResNets with group norm, and attention of one head at the coarsest levels, on both sides of a codebook. There
is no training here: no discriminator, no commitment loss.

    B batch, H W pixels, h w grid, K vocabulary, D width of a code
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.io.images import check_images
from dalle.layout import check_tokens, token_grid
from dalle.precision import full_precision, tf32
from dalle.vqgan.config import GROUPS, VQGANConfig

EPS = 1e-6  # of every group norm (release)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=EPS)


class Block(nn.Module):
    """x + two 3 x 3 convolutions, each after a norm and swish; a 1 x 1 convolution of x if widths differ."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = _norm(n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class Attention(nn.Module):
    """x + attention of every position to every position, by one head as wide as the level."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, h w, D)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


def downsample(width: int) -> nn.Sequential:
    """Half the sides, by a convolution that looks right and down."""
    conv = nn.Conv2d(width, width, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(width: int) -> nn.Sequential:
    """Twice the sides: each pixel four times, then a convolution."""
    conv = nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2.0), conv=conv))


class Level(nn.Module):
    """Blocks of one resolution, each followed by attention or none, then a resize or none."""

    def __init__(self, n_in: int, n_out: int, blocks: int, attention: bool):
        super().__init__()
        self.block = nn.ModuleList(Block(n_in if i == 0 else n_out, n_out) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(n_out) if attention else nn.Identity() for _ in self.block)
        self.downsample = self.upsample = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


def middle(width: int) -> nn.Sequential:
    """Block, attention, block at the coarsest resolution."""
    parts = {"block_1": Block(width, width), "attn_1": Attention(width), "block_2": Block(width, width)}
    return nn.Sequential(OrderedDict(parts))


class Encoder(nn.Sequential):
    """Pixels in [-1, 1] (B, 3, H, W) -> latents (B, latent, h, w), by its parts in the order below."""

    def __init__(self, config: VQGANConfig):
        widths = config.widths
        sizes = enumerate(zip((widths[0], *widths), widths, strict=False))
        levels = [Level(*sides, config.blocks, i in config.attention) for i, sides in sizes]
        for level, width in zip(levels[:-1], widths, strict=False):
            level.downsample = downsample(width)
        super().__init__()
        self.conv_in, self.down = nn.Conv2d(3, widths[0], 3, padding=1), nn.Sequential(*levels)
        self.mid, self.norm_out, self.swish = middle(widths[-1]), _norm(widths[-1]), nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], config.latent, 3, padding=1)


class Decoder(nn.Module):
    """Latents (B, latent, h, w) -> pixels about [-1, 1] (B, 3, H, W); `up` is finest first."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        sizes = enumerate(zip((*widths[1:], widths[-1]), widths, strict=True))
        self.up = nn.ModuleList(Level(*sides, config.blocks + 1, i in config.attention) for i, sides in sizes)
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = upsample(width)
        self.norm_out, self.conv_out = _norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """K code vectors, and the choice of one for a vector."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.quantizer = config.quantizer
        self.embedding = nn.Embedding(config.vocab_size, config.codebook_dim)
        if self.quantizer == "logits":
            self.proj = nn.Conv2d(config.codebook_dim, config.vocab_size, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Vectors (B, D, h, w) -> codes int64 (B, h, w)."""
        with full_precision(z.device):
            return self._nearest(z.float())

    def _nearest(self, z: Tensor) -> Tensor:
        if self.quantizer == "logits":
            return self.proj(z).argmax(dim=1)
        codes, z = self.vectors(), z.movedim(1, -1)  # (B, h, w, D)
        if self.quantizer == "cosine":
            z = F.normalize(z, dim=-1)
        return (codes.square().sum(dim=1) - 2 * z @ codes.T).argmin(dim=-1)  # |z|^2 is the same for all codes

    def vectors(self) -> Tensor:
        """(K, D), of unit length for "cosine"."""
        codes = self.embedding.weight
        return F.normalize(codes, dim=-1) if self.quantizer == "cosine" else codes


class VQGAN(nn.Module):
    """An `ImageTokenizer`: any image whose sides are multiples of `downsample_factor`."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.downsample_factor, self.vocab_size = config.downsample_factor, config.vocab_size
        self.encoder, self.decoder, self.quantize = Encoder(config), Decoder(config), Codebook(config)
        self.quant_conv = nn.Conv2d(config.latent, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent, 1)

    @torch.no_grad()
    @tf32(False)
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1], sides multiples of `downsample_factor` -> codes int64 (B, h * w)."""
        check_images(pixels, self.downsample_factor)
        return self.quantize(self.quant_conv(self.encoder(2 * pixels - 1))).flatten(1)

    @torch.no_grad()
    @tf32(False)
    def decode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens int64 (B, h * w), square unless `grid` is (h, w) -> float32 (B, 3, H, W) in [0, 1]."""
        check_tokens(tokens, self.vocab_size, "image_tokens")
        h, w = token_grid(tokens, grid)
        z = F.embedding(tokens, self.quantize.vectors()).movedim(2, 1).unflatten(2, (h, w))  # (B, D, h, w)
        return ((self.image(z).float() + 1) / 2).clamp(0, 1)

    def image(self, z: Tensor) -> Tensor:
        """Code vectors (B, D, h, w) -> pixels about [-1, 1] (B, 3, H, W)."""
        return self.decoder(self.post_quant_conv(z))

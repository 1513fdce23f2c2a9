"""VQGAN (Esser et al. 2021, "Taming transformers"), to encode and decode images; module names of its release.

ResNets with group norm, and attention of one head at the coarsest levels, on both sides of a codebook. There
is no training here: no discriminator, no commitment loss.

    B batch, H W pixels, h w grid, K vocabulary, D width of a code
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.io.images import check_images
from dalle.layout import check_tokens, token_grid
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


class Downsample(nn.Module):
    """Half the sides, by a convolution that looks right and down."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the sides: each pixel four times, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution, each followed by attention or none, then a resize or none."""

    def __init__(self, n_in: int, n_out: int, blocks: int, attention: bool, **resize: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(Block(n_in if i == 0 else n_out, n_out) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(n_out) for _ in range(blocks * attention))
        for name, module in resize.items():
            self.add_module(name, module)
        self.resize = tuple(resize)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        for name in self.resize:
            x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, width: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Block(width, width), Attention(width), Block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels in [-1, 1] (B, 3, H, W) -> latents (B, latent, h, w)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            resize = {"downsample": Downsample(width)} if level < last else {}
            before = widths[max(0, level - 1)]
            self.down.append(Level(before, width, config.blocks, level in config.attention, **resize))
        self.mid, self.norm_out = Middle(widths[-1]), _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, latent, h, w) -> pixels about [-1, 1] (B, 3, H, W); `up` is finest first."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent, widths[-1], 3, padding=1)
        self.mid, self.up = Middle(widths[-1]), nn.ModuleList()
        for level, width in enumerate(widths):
            resize = {"upsample": Upsample(width)} if level else {}
            before = widths[min(last, level + 1)]
            self.up.append(Level(before, width, config.blocks + 1, level in config.attention, **resize))
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
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1], sides multiples of `downsample_factor` -> codes int64 (B, h * w)."""
        check_images(pixels, self.downsample_factor)
        return self.quantize(self.quant_conv(self.encoder(2 * pixels - 1))).flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens int64 (B, h * w), square unless `grid` is (h, w) -> float32 (B, 3, H, W) in [0, 1]."""
        check_tokens(tokens, self.vocab_size, "image_tokens")
        h, w = token_grid(tokens, grid)
        z = F.embedding(tokens, self.quantize.vectors()).movedim(2, 1).unflatten(2, (h, w))  # (B, D, h, w)
        return ((self.image(z).float() + 1) / 2).clamp(0, 1)

    def image(self, z: Tensor) -> Tensor:
        """Code vectors (B, D, h, w) -> pixels about [-1, 1] (B, 3, H, W)."""
        return self.decoder(self.post_quant_conv(z))

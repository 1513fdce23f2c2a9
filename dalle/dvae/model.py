"""The dVAE, stage one (paper section 2.1, appendix A.1; module names of OpenAI's release).

Bottleneck ResNets without normalisation: the encoder turns pixels into logits over a vocabulary of
codes at each position, the decoder turns (relaxed) one-hot codes into the parameters of a
logit-Laplace distribution over the pixels.

Departures, all off by default: `residual_scale`, `logit_init_scale`, `codebook_init_std` and `min_log_scale`
help small models over the first hundred steps (docs/log.md says what each does).

    B batch, H W pixels, h w grid, K vocabulary, D width
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.dvae.config import DVAEConfig
from dalle.io.images import check_images
from dalle.layout import check_tokens, token_grid
from dalle.precision import full_precision, tf32

EPSILON = 0.1  # A.3: pixels are mapped into (0.1, 0.9)


def map_pixels(pixels: Tensor) -> Tensor:
    """phi of A.3: [0, 1] -> [0.1, 0.9], inside the support of the logit-Laplace."""
    return (1 - 2 * EPSILON) * pixels + EPSILON


def unmap_pixels(mapped: Tensor) -> Tensor:
    """phi^-1 of A.3, clamped to [0, 1]."""
    return ((mapped - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


class Conv2d(nn.Module):
    """A "same" convolution with the release's parameter names and initialisation (A.1).

    `full_precision` keeps it in fp32 under any autocast: both sides of the relaxation.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, full_precision: bool = False):
        super().__init__()
        self.full_precision = full_precision
        self.padding = (kernel - 1) // 2
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(n_out))
        nn.init.normal_(self.w, std=1 / math.sqrt(n_in * kernel**2))

    def forward(self, x: Tensor) -> Tensor:
        if not self.full_precision:
            return F.conv2d(x, self.w, self.b, padding=self.padding)
        with full_precision(x.device):
            return F.conv2d(x.float(), self.w.float(), self.b.float(), padding=self.padding)


class Block(nn.Module):
    """Resblock: id_path(x) + gain * res_path(x), four convolutions each after a ReLU.

    The 1x1 convolution comes last in the encoder (kernels 3, 3, 3, 1), first in the decoder.
    """

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], gain: float):
        super().__init__()
        hidden = n_out // 4
        sizes = [n_in, hidden, hidden, hidden, n_out]
        self.gain = gain
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels, start=1):
            layers[f"relu_{i}"] = nn.ReLU()
            layers[f"conv_{i}"] = Conv2d(sizes[i - 1], sizes[i], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The sum is fp32 under autocast too: in 16 bits it would lose a contribution of gain 1/64."""
        if not torch.is_autocast_enabled(x.device.type):
            return self.id_path(x) + self.gain * self.res_path(x)
        half = x.to(torch.get_autocast_dtype(x.device.type))  # all that the backward pass keeps of x
        return self.id_path(x).float() + self.gain * self.res_path(half).float()


class Encoder(nn.Module):
    """Mapped pixels (B, 3, H, W) -> logits over the codes (B, K, h, w)."""

    def __init__(self, config: DVAEConfig, gain: float):
        super().__init__()
        last = config.widths[0]
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(3, last, 7))
        for i, width in enumerate(config.widths):
            group: OrderedDict[str, nn.Module] = OrderedDict()
            for j in range(config.blocks_per_group):
                group[f"block_{j + 1}"] = Block(last, width, (3, 3, 3, 1), gain)
                last = width
            if 2**i < config.downsample_factor:
                group["pool"] = nn.MaxPool2d(2)
            layers[f"group_{i + 1}"] = nn.Sequential(group)
        output = Conv2d(last, config.vocab_size, 1, full_precision=True)
        with torch.no_grad():
            output.w.mul_(config.logit_init_scale)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=output))
        self.blocks = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Decoder(nn.Module):
    """Codes, one-hot or relaxed, (B, K, h, w) -> mu and ln b (B, 2 * 3, H, W)."""

    def __init__(self, config: DVAEConfig, gain: float):
        super().__init__()
        last = config.codebook_dim
        codebook = Conv2d(config.vocab_size, last, 1, full_precision=True)
        if config.codebook_init_std is not None:
            nn.init.normal_(codebook.w, std=config.codebook_init_std)
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=codebook)
        for i, width in enumerate(reversed(config.widths)):
            group: OrderedDict[str, nn.Module] = OrderedDict()
            for j in range(config.blocks_per_group):
                group[f"block_{j + 1}"] = Block(last, width, (1, 3, 3, 3), gain)
                last = width
            if 2**i < config.downsample_factor:
                group["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
            layers[f"group_{i + 1}"] = nn.Sequential(group)
        output = Conv2d(last, 6, 1)  # mu and ln b of each color (A.3)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=output))
        self.blocks = nn.Sequential(layers)
        self.min_log_scale = config.min_log_scale

    def forward(self, codes: Tensor) -> Tensor:
        """Also tokens int64 (B, h, w), which are looked up without making them one-hot."""
        codebook = self.blocks.input
        if codes.is_floating_point():
            x = codebook(codes)
        else:
            x = (F.embedding(codes, codebook.w[:, :, 0, 0].T) + codebook.b).movedim(-1, 1)  # (B, D, h, w)
        out = self.blocks[1:](x)
        if self.min_log_scale is None:
            return out
        mu, log_b = out.chunk(2, dim=1)
        return torch.cat([mu, log_b.clamp(min=self.min_log_scale)], dim=1)


class DVAE(nn.Module):
    """Encoder and decoder, and the two doors others use: `encode` and `decode`.

    Fully convolutional: any image whose sides are multiples of `downsample_factor`.
    """

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = config
        self.downsample_factor = config.downsample_factor
        """Pixels on a side of one token."""
        self.vocab_size = config.vocab_size
        """Number of codes."""
        gain = config.residual_scale
        if gain is None:
            gain = (len(config.widths) * config.blocks_per_group) ** -2
        self.encoder = Encoder(config, gain)
        self.decoder = Decoder(config, gain)

    def fsdp_groups(self) -> list[list[nn.Module]]:
        """Groups that sharded training gathers at once, in order; computed in 16 bit under autocast."""
        return [[block] for block in self.modules() if isinstance(block, Block)]

    @tf32(False)
    def codebook_logits(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> logits over the codes (B, K, h, w), fp32."""
        return self.encoder(map_pixels(pixels))

    @tf32(False)
    def reconstruct(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, K, h, w), one-hot or relaxed -> mu and ln b, each (B, 3, H, W) in fp32."""
        mu, log_b = self.decoder(codes).float().chunk(2, dim=1)
        return mu, log_b

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Most likely codes (2.2: argmax, no Gumbel noise).

        Args:
            pixels: float (B, 3, H, W) in [0, 1], sides multiples of `downsample_factor`.

        Returns:
            int64 (B, h * w) in raster order.
        """
        check_images(pixels, self.downsample_factor)
        return self.codebook_logits(pixels).argmax(dim=1).flatten(1)

    @torch.no_grad()
    @tf32(False)
    def decode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images of tokens: phi^-1(sigmoid(mu)), the log scale is dropped (A.3).

        Args:
            tokens: int64 (B, h * w).
            grid: (h, w); square unless given.

        Returns:
            float32 (B, 3, H, W) in [0, 1].
        """
        check_tokens(tokens, self.vocab_size, "image_tokens")
        h, w = token_grid(tokens, grid)
        mu, _ = self.decoder(tokens.view(-1, h, w)).float().chunk(2, dim=1)
        return unmap_pixels(torch.sigmoid(mu))

"""Classifier of noised images for guidance (Dhariwal and Nichol 2021, section 4), with OpenAI's names.

The way down and the middle of a U-Net, then attention pooling as in CLIP: the mean of all positions asks.

    B batch, C channels of the coarsest level, N its positions, K classes
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle.precision import full_precision
from dalle.unet.blocks import FP32GroupNorm, Pointwise
from dalle.unet.config import ClassifierConfig
from dalle.unet.model import Encoder


class AttentionPool(nn.Module):
    """Features (B, C, H, W) -> logits (B, K): what the mean of all positions attends to.

    Channels of queries, keys and values are always in the order (3, heads, d).
    """

    def __init__(self, positions: int, width: int, head_width: int, classes: int):
        super().__init__()
        self.heads = width // head_width
        self.positional_embedding = nn.Parameter(torch.empty(width, positions + 1))
        nn.init.normal_(self.positional_embedding, std=width**-0.5)
        self.qkv_proj, self.c_proj = Pointwise(width, 3 * width), Pointwise(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.T
        q, k, v = rearrange(self.qkv_proj(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # (B, h, 1, d)
        return self.c_proj(rearrange(mixed, "b h n d -> b n (h d)"))[:, 0]


class Classifier(Encoder):
    """Noised images and their times -> logits over classes."""

    def __init__(self, config: ClassifierConfig):
        super().__init__(config, in_channels=3)
        side, width = config.image_size // config.downsample_factor, config.widths[-1]
        pool = AttentionPool(side**2, width, config.head_width, config.classes)
        self.out = nn.Sequential(FP32GroupNorm(width), nn.SiLU(), pool)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x float (B, 3, H, W) in [-1, 1] plus noise, of `image_size`, times t (B,) -> fp32 (B, K).

        Raises:
            ValueError: images of another size.
        """
        size = self.config.image_size
        if x.shape[1:] != (3, size, size):
            raise ValueError(f"x must be (B, 3, {size}, {size}), got {tuple(x.shape)}; resize")
        emb = self.embed_time(t)
        for block in self.input_blocks:
            x = block(x, emb)
        x = self.middle_block(x, emb)
        with full_precision(x.device):
            return self.out(x.float())

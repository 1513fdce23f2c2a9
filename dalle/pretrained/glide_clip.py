"""GLIDE's noised CLIP: clip_image_enc.pt and clip_text_enc.pt of github.com/openai/glide-text2im.

A ViT over noised 64 x 64 images that reads their time in place of a class token, and a causal text
transformer (Nichol et al. 2021, sections 2.4 and 4.4). Names are the release's, without `blocks.` in front.

    B batch, N positions, D width, h heads of width d, E width of the shared space
"""

from collections.abc import Callable
from functools import partial
from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle.config import check_positive, configuration
from dalle.io.images import check_images
from dalle.nn.blocks import FP32LayerNorm
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches

HEAD_WIDTH = 64  # release
PIXEL_MEAN = (122.77093945, 116.74601272, 104.09373519)  # of 8-bit pixels (release)
PIXEL_STD = (68.50053285, 66.63215831, 70.32316309)


@configuration(kw_only=True)
class TowerConfig:
    """Shape of one tower."""

    width: int
    depth: int  # layers
    positions: int  # of the image with the time in front, or of the text
    embed_width: int
    text_vocab: int | None = None  # of the text tower
    times: int | None = None  # of the image tower: steps of the schedule
    patch_size: int | None = None

    def __post_init__(self):
        check_positive(self, *vars(self))
        if self.width % HEAD_WIDTH:
            raise ValueError(f"width {self.width} is no multiple of the head width {HEAD_WIDTH}")


class Layer(nn.Module):
    """x + attention, x + MLP with the exact GELU, each after a norm; keys have no bias."""

    def __init__(self, width: int):
        super().__init__()
        linear = {f"f_{part}": nn.Linear(width, width, bias=part != "k") for part in "qkvc"}
        self.f_attn = nn.ModuleDict({"ln": FP32LayerNorm(width), **linear})
        linear = {"f_1": nn.Linear(width, 4 * width), "f_2": nn.Linear(4 * width, width)}
        self.f_mlp = nn.ModuleDict({"ln": FP32LayerNorm(width), **linear})

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        attn, mlp = self.f_attn, self.f_mlp
        normed = attn["ln"](x)
        parts = (rearrange(attn[f"f_{part}"](normed), "b n (h d) -> b h n d", d=HEAD_WIDTH) for part in "qkv")
        mixed = F.scaled_dot_product_attention(*parts, is_causal=causal)
        x = x + attn["f_c"](rearrange(mixed, "b h n d -> b n (h d)"))
        return x + mlp["f_2"](F.gelu(mlp["f_1"](mlp["ln"](x))))


class Tower(nn.Module):
    """Layers, and the projection of one state to a unit vector."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.config, width = config, config.width
        self.input = nn.Module()
        self.input.w_pos = nn.Parameter(torch.zeros(config.positions, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(config.depth))
        projection = nn.Linear(width, config.embed_width, bias=False)
        self.output = nn.ModuleDict({"ln": FP32LayerNorm(width), "f": projection})

    def project(self, x: Tensor, at: Tensor, causal: bool) -> Tensor:
        """Inputs (B, N, D), positions (B,) -> fp32 (B, E), the states there as unit vectors."""
        for layer in self.layers:
            x = layer(x, causal)
        state = x[torch.arange(len(x), device=x.device), at]
        return F.normalize(self.output["f"](self.output["ln"](state)).float(), dim=-1)


class ImageTower(Tower):
    """Noised images and their times -> unit vectors."""

    logit_scale = 100.0
    """Factor on cosines; fixed in the release, and in no file."""

    def __init__(self, config: TowerConfig):
        super().__init__(config)
        width, patch = config.width, config.patch_size
        self.image_size = patch * isqrt(config.positions - 1)
        self.input.w_t = nn.Parameter(torch.zeros(config.times, width))
        self.input.patch_proj = nn.Parameter(torch.zeros(width, 3, patch, patch))
        self.input.ln = FP32LayerNorm(width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x float (B, 3, H, W), in [-1, 1] before noise, whole times t (B,) of 1000 -> (B, E).

        Raises:
            ValueError: images of another size.
        """
        if x.shape[1:] != (3, self.image_size, self.image_size):
            size = f"{self.image_size}, {self.image_size}"
            raise ValueError(f"x must be (B, 3, {size}), got {tuple(x.shape)}; resize")
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        pixels = ((x + 1) * 127.5 - mean) / std
        patches = F.conv2d(pixels, self.input.patch_proj, stride=self.config.patch_size)
        image = patches.flatten(2).transpose(1, 2)  # (B, N - 1, D)
        inputs = torch.cat([self.input.w_t[t.long()][:, None], image], dim=1) + self.input.w_pos
        return self.project(self.input.ln(inputs), torch.zeros_like(t, dtype=torch.int64), causal=False)


class TextTower(Tower):
    """Text ids -> unit vectors, of the state of each caption's last id."""

    def __init__(self, config: TowerConfig):
        super().__init__(config)
        self.input.w_voc = nn.Parameter(torch.zeros(config.text_vocab, config.width))

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids int64 (B, N) with any pads, and how many of each caption are its own (B,) -> (B, E)."""
        return self.project(F.embedding(ids, self.input.w_voc) + self.input.w_pos, lengths - 1, causal=True)


class NoisedCLIPScorer:
    """A `Scorer` of clean images by both towers at time 0, with `log_prob` of noised ones for guidance."""

    def __init__(self, image: ImageTower, text: TextTower):
        from open_clip import SimpleTokenizer

        self.model = nn.ModuleDict({"image": image, "text": text})
        self.tokenizer = SimpleTokenizer(context_length=text.config.positions)
        if (vocab := text.config.text_vocab) < self.tokenizer.vocab_size:
            raise ValueError(f"it reads {vocab} text ids, CLIP's tokenizer has {self.tokenizer.vocab_size}")

    @torch.no_grad()
    def embed_caption(self, caption: str) -> Tensor:
        """A caption, cut if it is too long, -> a unit vector (1, E)."""
        ids = self.tokenizer(caption)
        lengths = ids.argmax(dim=1) + 1  # the end of text has the highest id
        device = self.model["text"].input.w_pos.device
        return self.model["text"](ids.to(device), lengths.to(device))

    def log_prob(self, caption: str) -> Callable[[Tensor, Tensor], Tensor]:
        """Of noised images (B, 3, H, W) and times (B,): (B,), 100 times the cosine (GLIDE, section 2.4)."""
        image, vector = self.model["image"], self.embed_caption(caption)[0]
        return lambda x, times: image.logit_scale * (image(x, times) @ vector)

    def score(self, pixels: Tensor, caption: str) -> Tensor:
        """Pixels (N, 3, H, W) in [0, 1] -> cosines (N,)."""
        check_images(pixels)
        image, size = self.model["image"], (self.model["image"].image_size,) * 2
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        times = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)
        return image(2 * pixels - 1, times) @ self.embed_caption(caption)[0]


def infer_config(shapes: Shapes, found: DetectedCheckpoint, image: bool) -> TowerConfig:
    """Sizes from the shapes."""
    positions, width = shapes["input.w_pos"]
    sizes = {"text_vocab": None if image else shapes["input.w_voc"][0]}
    if image:
        sizes |= {"times": shapes["input.w_t"][0], "patch_size": shapes["input.patch_proj"][2]}
    return TowerConfig(
        width=width,
        depth=count_matches(shapes, "layers.*.f_attn.ln.weight"),
        positions=positions,
        embed_width=shapes["output.f.weight"][0],
        **sizes,
    )


RENAMES = {r"^blocks\.block_": "layers.", r"^blocks\.": "", r"\.[wg]$": ".weight", r"\.b$": ".bias"}


def _format(part: str, table: str, build: type[Tower]) -> CheckpointFormat:
    return CheckpointFormat(
        name=f"{part} tower of GLIDE's noised CLIP",
        kind=f"noised CLIP's {part} tower",
        license="MIT, of github.com/openai/glide-text2im",
        key_patterns=(f"blocks.input.{table}", "blocks.block_*.f_attn.f_q.w", "blocks.output.f.w"),
        infer_config=partial(infer_config, image=build is ImageTower),
        build=build,
        renames=lambda names: RENAMES,
    )


IMAGE, TEXT = _format("image", "w_t", ImageTower), _format("text", "w_voc", TextTower)

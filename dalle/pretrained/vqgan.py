"""VQGAN files of taming-transformers (also minDALL-E's first stage), ruDALL-E and LlamaGen.

One network under two sets of names, and ruDALL-E's with wavelets behind it. The training losses in taming's
and ruDALL-E's files (VGG, a discriminator) are ignored. Gumbel models are recognized by `quantize.proj`,
LlamaGen's unit vectors by its names.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches
from dalle.vqgan import VQGAN, VQGANConfig

BANDS = 4  # of the wavelets


def infer_config(shapes: Shapes, found: DetectedCheckpoint, quantizer: str = "nearest") -> VQGANConfig:
    """Sizes from the shapes, by taming's names; ValueError for a reduced codebook."""
    if "quantize.used" in shapes:
        raise ValueError("its codes were renumbered after training (quantize.used), which is not supported")
    levels = count_matches(shapes, "encoder.down.*.block.0.conv1.weight")
    blocks = count_matches(shapes, "encoder.down.0.block.*.conv1.weight")
    vocab_size, codebook_dim = shapes["quantize.embedding.weight"]
    return VQGANConfig(
        widths=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        blocks=blocks,
        attention=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shapes),
        latent=shapes["encoder.conv_out.weight"][0],
        codebook_dim=codebook_dim,
        vocab_size=vocab_size,
        quantizer="logits" if "quantize.proj.weight" in shapes else quantizer,
    )


TAMING = CheckpointFormat(
    name="VQGAN of taming-transformers",
    kind="image tokenizer",
    license="not stated for taming's weights (its code is MIT), nor for minDALL-E's first stage (Apache-2.0)",
    key_patterns=(
        "encoder.down.*.block.*.conv1.weight",
        "decoder.up.*.block.*.conv1.weight",
        "quantize.embedding.weight",
    ),
    infer_config=infer_config,
    build=VQGAN,
    ignored=("loss.*",),
)
GUMBEL = replace(
    TAMING,
    name="Gumbel VQGAN of taming-transformers or ruDALL-E",
    license="not stated for taming's weights (its code is MIT); ruDALL-E's Apache-2.0",
    key_patterns=(*TAMING.key_patterns[:2], "quantize.proj.weight", "quantize.embed.weight"),
    renames=lambda names: {r"^quantize\.embed\.": "quantize.embedding."},
)


def _taming_names(names: Collection[str]) -> dict[str, str]:
    """Names of LlamaGen -> taming's. Its decoder counts levels from the coarsest."""
    levels = count_matches(names, "decoder.conv_blocks.*.res.0.conv1.weight")
    ups = {rf"^decoder\.conv_blocks\.{i}\.": f"decoder.up.{levels - 1 - i}." for i in range(levels)}
    middle = {rf"\.mid\.{i}\.": f".mid.{part}." for i, part in enumerate(("block_1", "attn_1", "block_2"))}
    return ups | middle | {r"^encoder\.conv_blocks\.": "encoder.down.", r"\.res\.": ".block."}


LLAMAGEN = replace(
    TAMING,
    name="VQ of LlamaGen",
    license="MIT, of github.com/FoundationVision/LlamaGen",
    key_patterns=("encoder.conv_blocks.*.res.*", "decoder.conv_blocks.*.res.*", "quantize.embedding.weight"),
    infer_config=partial(infer_config, quantizer="cosine"),
    ignored=("quantize.codebook_used",),
    renames=_taming_names,
)


class InverseWavelets(nn.Module):
    """One step of an inverse wavelet transform by filters of length 2 (in the published file, Haar's)."""

    def __init__(self):
        super().__init__()
        for name, shape in (("col", (1, 1, 2, 1)), ("row", (1, 1, 1, 2))):
            self.register_buffer(f"g0_{name}", torch.zeros(shape))
            self.register_buffer(f"g1_{name}", torch.zeros(shape))

    def forward(self, bands: Tensor) -> Tensor:
        """(B, 12, H, W) -> (B, 3, 2 H, 2 W)."""
        low, high = bands[:, :3], bands[:, 3:].unflatten(1, (3, BANDS - 1))
        down, across, both = high.unbind(2)
        rows = self.g0_row, self.g1_row  # the package takes them for columns, and the other way round
        left, right = (_joined(*pair, *rows, dim=2) for pair in ((low, down), (across, both)))
        return _joined(left, right, self.g0_col, self.g1_col, dim=3)


def _joined(low: Tensor, high: Tensor, g0: Tensor, g1: Tensor, dim: int) -> Tensor:
    """Twice the length along a side: the sum of both parts, upsampled by their filters."""
    shape, stride = ((1, 1, 2, 1), (2, 1)) if dim == 2 else ((1, 1, 1, 2), (1, 2))
    filters = (g.view(shape).repeat(low.shape[1], 1, 1, 1) for g in (g0, g1))
    options = {"stride": stride, "groups": low.shape[1]}
    return sum(F.conv_transpose2d(x, by, **options) for x, by in zip((low, high), filters, strict=True))


class WaveletVQGAN(VQGAN):
    """ruDALL-E's vqgan.gumbelf8-sber-dwt.model.ckpt, which decodes images of twice the sides that it encodes.

    The decoder has 12 channels: an image of half the size, then for each color its differences down, across
    and both.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.decoder.conv_out = nn.Conv2d(config.widths[0], 3 * BANDS, 3, padding=1)
        self.wavelets = InverseWavelets()

    def image(self, z: Tensor) -> Tensor:
        return self.wavelets(super().image(z))


WAVELET_RENAMES = {
    r"^quantize\.embed\.": "quantize.embedding.",
    r"^decoder\.(decoder|post_quant_conv)\.": r"\1.",
    r"^decoder\.idwt\.": "wavelets.",
}
WAVELETS = replace(
    TAMING,
    name="VQGAN of ruDALL-E with wavelets",
    license="Apache-2.0, of github.com/ai-forever/ru-dalle",
    key_patterns=(
        "encoder.down.*.block.*.conv1.weight",
        "decoder.decoder.up.*.block.*.conv1.weight",
        "decoder.idwt.*",
        "quantize.embed.weight",
    ),
    build=WaveletVQGAN,
    renames=lambda names: WAVELET_RENAMES,
    # the decoder has its own post_quant_conv
    ignored=("post_quant_conv.*", "loss.*"),
)

"""ruDALL-E's VQGAN with wavelets, vqgan.gumbelf8-sber-dwt.model.ckpt.

It encodes 256 x 256 pixels by the encoder of the Gumbel f8 and decodes to 512 x 512. The decoder has 12
channels: an image of half the size, then for each color its differences down, across and both, which one step
of the inverse wavelet transform with the file's filters (Haar's) turns into pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.pretrained.family import CheckpointFormat
from dalle.pretrained.vqgan import infer_config
from dalle.vqgan import VQGAN, VQGANConfig

BANDS = 4


class InverseWavelets(nn.Module):
    """One step of the inverse of a transform by filters of length 2."""

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
    """A VQGAN whose decoded images have twice the sides of those that it encodes."""

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.decoder.conv_out = nn.Conv2d(config.widths[0], 3 * BANDS, 3, padding=1)
        self.wavelets = InverseWavelets()

    def image(self, z: Tensor) -> Tensor:
        return self.wavelets(super().image(z))


RENAMES = {
    r"^model\.": "",
    r"^quantize\.embed\.": "quantize.embedding.",
    r"^decoder\.(decoder|post_quant_conv)\.": r"\1.",
    r"^decoder\.idwt\.": "wavelets.",
}
FAMILY = CheckpointFormat(
    name="VQGAN of ruDALL-E with wavelets",
    kind="image tokenizer",
    license="Apache-2.0, of github.com/ai-forever/ru-dalle",
    key_patterns=(
        "*encoder.down.*.block.*.conv1.weight",
        "*decoder.decoder.up.*.block.*.conv1.weight",
        "*decoder.idwt.*",
        "*quantize.embed.weight",
    ),
    infer_config=infer_config,
    build=WaveletVQGAN,
    renames=lambda names: RENAMES,
    # the decoder has its own post_quant_conv
    ignored=("model.post_quant_conv.*", "post_quant_conv.*", "loss.*", "model.loss.*"),
)

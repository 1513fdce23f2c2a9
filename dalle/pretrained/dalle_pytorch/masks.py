"""Shape, masks, shifts and memory of DALLE-pytorch's transformer (lucidrains, 1.6.6); its blocks are beside this file.

B batch, n slots of this call, C captions, N image tokens, D width, d width of a head, W columns
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.nn.kv_cache import KVCache
from dalle.pretrained.external_transformer import ForeignLayout

KINDS = ("full", "axial_row", "axial_col", "conv_like")
CONV_KERNEL = 5  # the package lets nothing else be chosen


@dataclass(frozen=True)
class DallePytorchConfig:
    """Shape of it."""

    width: int
    """D."""
    heads: int
    """Attention heads."""
    head_dim: int
    """d; heads * d need not be D."""
    kinds: tuple[str, ...]
    """Kind of each layer, one of KINDS."""
    text_len: int
    """Text ids, without the start."""
    grid: tuple[int, int]
    """Rows and columns of image tokens, equal."""
    text_vocab: int
    """Text ids without the pads."""
    image_vocab: int
    """Codes of the image tokenizer."""
    shift: bool = True
    """States are mixed with those of the tokens above and to the left."""
    rotary: int = 0
    """Numbers of a head that are rotated; 0 has learned positions instead."""
    sandwich: bool = False
    """A norm after each path too."""
    reversible: bool = False
    """Two trunks, averaged at the end."""
    stable: bool = False
    """Final states are divided by their largest number."""
    shared: bool = False
    """Tokens are embedded by rows of the output matrix."""

    def __post_init__(self):
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ValueError(
                f"layers of kind {unknown[0]!r}, which cannot be held here; can be: {', '.join(KINDS)}"
            )
        if self.shift and self.width % 4:
            raise ValueError(f"width must be a multiple of 4 where tokens are shifted, got {self.width}")

    @property
    def layout(self) -> ForeignLayout:
        """Lengths and offsets of the stream."""
        return ForeignLayout(self.text_len, self.grid, self.text_vocab, self.image_vocab, zero_is_pad=True)


def image_sees(kind: str, side: int) -> Tensor:
    """bool (N, N): which image tokens each sees, by raster index; each itself and what comes before it."""
    index = torch.arange(side * side)
    row, column = index // side, index % side
    up, left = row[:, None] - row, column[:, None] - column
    sees = {
        "full": torch.ones(len(index), len(index), dtype=torch.bool),
        "axial_row": up == 0,
        "axial_col": left == 0,
        "conv_like": (up < CONV_KERNEL) & (left >= 0) & (left < CONV_KERNEL),
    }
    return sees[kind] & (index[:, None] >= index)


class Memory:
    """What drawing keeps of a layer: keys and values, and the last W image states of both paths before the shift."""

    def __init__(self, cache: KVCache, config: DallePytorchConfig, device: torch.device):
        self.cache, self.candidates, self.text_slots = cache, cache.candidates, config.layout.text_slots
        rows, columns = cache.captions * cache.candidates, config.grid[1] * config.shift
        self.rings = [torch.zeros(rows, columns, config.width // 2, device=device) for _ in range(2)]

    def fill(self, ring: int, image: Tensor) -> None:
        """Image states (C, p, D) at the beginning of each caption's stream, for all candidates of it."""
        kept, columns = self.rings[ring], self.rings[ring].shape[1]  # no columns where nothing is shifted
        for position in range(max(0, image.shape[1] - columns), image.shape[1]):
            kept[:, position % columns] = image[:, position, : kept.shape[2]].repeat_interleave(
                self.candidates, 0
            )

    def shifted(self, ring: int, x: Tensor, position: Tensor) -> Tensor:
        """States (B, D) of image token `position` (1,) -> mixed with those above and to the left; keeps them."""
        kept, columns = self.rings[ring], self.rings[ring].shape[1]
        quarter = x.shape[1] // 4
        above = kept.index_select(1, position % columns)[:, 0, :quarter]
        left = kept.index_select(1, (position - 1) % columns)[:, 0, quarter:] * (position % columns != 0)
        kept.index_copy_(1, position % columns, x[:, None, : 2 * quarter].to(kept.dtype))
        return torch.cat([above, left, x[:, 2 * quarter :]], dim=1)


def shifted(x: Tensor, text_slots: int, columns: int) -> Tensor:
    """States (B, n, D): in text half of each is the one before; in the image a quarter above's, a quarter left's."""
    text, image = x[:, :text_slots], x[:, text_slots:]
    half, quarter = x.shape[2] // 2, x.shape[2] // 4
    text = torch.cat([F.pad(text[..., :half], (0, 0, 1, -1)), text[..., half:]], dim=2)
    above = F.pad(image[..., :quarter], (0, 0, columns, 0))[:, : image.shape[1]]
    left = F.pad(image[..., quarter:half], (0, 0, 1, 0))[:, : image.shape[1]]
    inside = torch.arange(image.shape[1], device=x.device) % columns != 0
    return torch.cat([text, torch.cat([above, left * inside[:, None], image[..., half:]], dim=2)], dim=1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """The first r numbers of x (..., n, d), in pairs, by angles (n, r)."""
    turned, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    one, other = turned.float().unflatten(-1, (-1, 2)).unbind(-1)
    beside = torch.stack([-other, one], dim=-1).flatten(-2)
    return torch.cat([(turned * angles.cos() + beside * angles.sin()).to(x.dtype), rest], dim=-1)

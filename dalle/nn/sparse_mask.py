"""The sparse mask of one kind of layer, in the form each attention backend needs (paper Figure 11).

Every form evaluates the one predicate of dalle/masks.py. It is made when a backend first asks for it and kept
for the device it was asked for, so a model that never needs a mask of all N x N pairs never builds one.

    B batch, H heads, N slots, d width of a head, R rows and C columns of the grid
    G groups of M image slots that share their L near keys
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dalle.layout import TokenLayout
from dalle.masks import dense_mask, visible


class SparseMask:
    """The visible pairs of one kind of layer.

    Args:
        kind: see dalle/masks.py.
        layout: lengths of the stream.
        kernel: side of the convolution.

    Raises:
        ValueError: as `masks.visible`.
    """

    def __init__(self, kind: str, layout: TokenLayout, kernel: int = 11):
        visible(kind, layout, kernel)  # refuses what cannot be
        self.kind, self.layout, self.kernel = kind, layout, kernel
        self.rows_above = {"row": 1, "conv": (kernel + 1) // 2}.get(kind, 0)
        self._dense: Tensor | None = None
        self._near: Tensor | None = None
        self._blocks: BlockMask | None = None

    @torch.inference_mode(False)  # what sampling builds must also serve training
    def dense(self, device: torch.device) -> Tensor:
        """bool (N, N), True = visible, raster order."""
        if self._dense is None or self._dense.device != device:
            self._dense = dense_mask(self.kind, self.layout, self.kernel).to(device)
        return self._dense

    @torch.inference_mode(False)
    def near(self, device: torch.device) -> Tensor:
        """bool (G, M, L): which of its near keys each image query sees."""
        if self._near is None or self._near.device != device:
            self._near = self._near_mask().to(device)
        return self._near

    @torch.inference_mode(False)
    def blocks(self, device: torch.device) -> BlockMask:
        """FlexAttention's blocks of 128 x 128; for "column" over `to_column_major` slots (11c)."""
        if self._blocks is None or self._blocks.kv_num_blocks.device != device:
            self._blocks = self._block_mask(device)
        return self._blocks

    # Image slots by groups, for scores over near keys alone.

    def group(self, x: Tensor) -> Tensor:
        """Image slots in raster order (B, H, R * C, d) -> (B, H, G, M, d): by rows, or by columns for
        "column"."""
        order = "b h (r c) d -> b h c r d" if self.kind == "column" else "b h (r c) d -> b h r c d"
        return rearrange(x, order, r=self.layout.grid[0])

    def ungroup(self, x: Tensor) -> Tensor:
        """The way back: (B, H, G, M, d) -> (B, H, R * C, d)."""
        return rearrange(
            x, "b h c r d -> b h (r c) d" if self.kind == "column" else "b h r c d -> b h (r c) d"
        )

    def near_keys(self, x: Tensor) -> Tensor:
        """Grouped keys (B, H, G, M, d) -> (B, H, G, L, d): each group's own and those of the rows above
        it."""
        above, rows = self.rows_above, x.shape[2]
        if not above:
            return x
        padded = F.pad(x, (0, 0, 0, 0, above, 0))
        return torch.cat([padded[:, :, i : i + rows] for i in range(above + 1)], dim=3)

    def _near_mask(self) -> Tensor:
        layout = self.layout
        slots = (
            torch.arange(layout.num_image_tokens, dtype=torch.float32)[None, None, :, None] + 1
        )  # 0: none above the top
        queries = self.group(slots)  # (1, 1, G, M, 1)
        keys = self.near_keys(queries).transpose(-1, -2)  # (1, 1, G, 1, L)
        sees = visible(self.kind, layout, self.kernel)(
            queries.long() + layout.text_len, keys.long() + layout.text_len
        )
        return (sees & (keys > 0))[0, 0]

    # All slots with rows and columns of the image exchanged (Figure 11c), for blocks of pairs.

    def to_column_major(self, x: Tensor) -> Tensor:
        """(..., N, d) in raster order -> image slots column by column."""
        return self._exchange(x, "... (r c) d -> ... (c r) d")

    def to_row_major(self, x: Tensor) -> Tensor:
        """The way back."""
        return self._exchange(x, "... (c r) d -> ... (r c) d")

    def _exchange(self, x: Tensor, order: str) -> Tensor:
        text, image = x.split([self.layout.text_len, self.layout.num_image_tokens], dim=-2)
        return torch.cat([text, rearrange(image, order, r=self.layout.grid[0])], dim=-2)

    def _block_mask(self, device: torch.device) -> BlockMask:
        layout, sees = self.layout, visible(self.kind, self.layout, self.kernel)
        text, rows, columns = layout.text_len, layout.rows, layout.columns

        def raster_slot(slot: Tensor) -> Tensor:
            image = slot - text
            return torch.where(slot < text, slot, text + image % rows * columns + image // rows)

        def straight(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees(q, k)

        def exchanged(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees(raster_slot(q), raster_slot(k))

        rule = exchanged if self.kind == "column" else straight
        return create_block_mask(rule, None, None, layout.seq_len, layout.seq_len, device=device)

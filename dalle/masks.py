"""Sparse attention masks: which keys each query sees, and which layer uses which (paper Figure 11, 2.2).

One predicate defines each kind; a dense mask, a row of it while sampling, or a block mask are ways of
evaluating the predicate. Text sees the text before it; every image position sees all text. Among image
positions, with q, k their raster indices, d = q - k >= 0 and W columns, a query sees

    row      d <= W: itself and the W positions before it, across row ends (11a)
    column   d mod W == 0: the column above it (11b; 11c is the same, transposed for speed)
    conv     d < W (kernel + 1) / 2 and the circular column distance <= (kernel - 1) / 2 (11d)
    causal   everything before it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dalle.layout import TokenLayout

if TYPE_CHECKING:
    from torch import Tensor

    MaskFn = Callable[[Tensor, Tensor], Tensor]

KINDS = ("row", "column", "conv", "causal")


def visible(kind: str, layout: TokenLayout, kernel: int = 11) -> MaskFn:
    """The predicate (q, k) -> bool over positions of the sequence, elementwise with broadcasting.

    Args:
        kind: one of KINDS.
        layout: lengths of the sequence.
        kernel: side of the convolution, odd, at most the number of columns; only "conv" reads it.

    Raises:
        ValueError: unknown kind, or a kernel that is even or wider than the grid.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown attention kind {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "conv" and (kernel < 1 or kernel % 2 == 0 or kernel > layout.columns):
        raise ValueError(f"kernel must be odd and at most the grid's {layout.columns} columns, got {kernel}")
    text, width = layout.text_len, layout.columns

    def mask_fn(q: Tensor, k: Tensor) -> Tensor:
        d = q - k
        if kind == "causal":
            return d >= 0
        if kind == "row":
            image = d <= width
        elif kind == "column":
            image = d % width == 0
        else:
            beside = (d % width).minimum(width - d % width)  # circular column distance
            image = (d < width * (kernel + 1) // 2) & (beside <= (kernel - 1) // 2)
        return (d >= 0) & ((k < text) | image)

    return mask_fn


def dense_mask(kind: str, layout: TokenLayout, kernel: int = 11) -> Tensor:
    """bool (N, N), True = visible, raster order; row q is what position q sees."""
    import torch

    positions = torch.arange(layout.seq_len)
    return visible(kind, layout, kernel)(positions[:, None], positions[None, :])


def layer_kinds(depth: int) -> list[str]:
    """Kind of each attention layer (2.2): row, column, row, row, ... and conv in the last.

    Counting from 1, layer i is column if (i - 2) mod 4 == 0; 64 layers have 47 row, 16 column, 1 conv.
    """
    if depth < 1:
        raise ValueError(f"depth must be positive, got {depth}")
    return ["column" if i % 4 == 2 else "row" for i in range(1, depth)] + ["conv"]

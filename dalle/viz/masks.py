"""Attention mask plots (Figure 11), at the paper's small size or any other.

A row of a mask is a query, a column a key. Visible text and image keys have a color each, hidden are pale.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle.io.images import captioned_grid
from dalle.layout import TokenLayout
from dalle.masks import visible
from dalle.nn.attention import SparseMask

FIGURE_11 = TokenLayout(text_len=6, grid=4, text_vocab=1, image_vocab=1)
"""The lengths in the paper's figure: 6 text tokens, 4 x 4 image tokens; its convolution is 3 wide."""
HIDDEN, TEXT, IMAGE, QUERY = (233, 236, 240), (242, 153, 74), (45, 108, 181), (192, 40, 60)
SIDE = 352  # minimum side of a mask's image in pixels


def plot_mask(
    kind: str,
    layout: TokenLayout = FIGURE_11,
    kernel: int = 3,
    transposed: bool = False,
    cell: int | None = None,
) -> Image.Image:
    """The mask of a "row", "column", "conv" or "causal" layer.

    `transposed` orders image positions by columns, as the paper computes column layers (Figure 11c); `cell`
    is pixels per query and key, by default such that the image is at least `SIDE` wide.
    """
    pattern = SparseMask(kind, layout, kernel)
    mask = pattern.dense(torch.device("cpu"))
    if transposed:
        mask = pattern.to_column_major(pattern.to_column_major(mask).T).T  # keys, then queries
    return _tiles(_colors(mask, torch.arange(layout.seq_len) < layout.text_len), cell, SIDE)


def plot_figure_11(layout: TokenLayout = FIGURE_11, kernel: int = 3, cell: int | None = None) -> Image.Image:
    """The four masks of Figure 11 with their names: row, column, column transposed, causal convolution."""
    masks = [
        ("(a) row", "row", False),
        ("(b) column", "column", False),
        ("(c) column, image positions transposed", "column", True),
        (f"(d) causal convolution, {kernel} x {kernel}", "conv", False),
    ]
    cells = [(name, plot_mask(kind, layout, kernel, columns, cell)) for name, kind, columns in masks]
    return captioned_grid(cells, columns=2)


def plot_receptive_field(
    kind: str, layout: TokenLayout, row: int, column: int, kernel: int = 11, cell: int | None = None
) -> Image.Image:
    """Image positions visible to the query at (row, column), on the image grid; the query itself is red."""
    keys, query = torch.arange(layout.num_image_tokens) + layout.text_len, query_at(layout, row, column)
    mask = visible(kind, layout, kernel)(torch.tensor(query), keys).view(layout.grid)
    colors = _colors(mask, torch.zeros(layout.columns, dtype=torch.bool))
    colors[row, column] = QUERY
    return _tiles(colors, cell, 192)


def query_at(layout: TokenLayout, row: int, column: int) -> int:
    """The position that predicts the image token at (row, column)."""
    if not (0 <= row < layout.rows and 0 <= column < layout.columns):
        raise ValueError(f"({row}, {column}) is not in the grid of {layout.rows} x {layout.columns} tokens")
    return layout.text_len + row * layout.columns + column


def _colors(mask: Tensor, is_text: Tensor) -> np.ndarray:
    """bool (Q, K) and which keys are text (K,) -> uint8 (Q, K, 3)."""
    shown = np.where(is_text[None, :, None], np.uint8(TEXT), np.uint8(IMAGE))
    return np.where(mask[:, :, None], shown, np.uint8(HIDDEN))


def _tiles(colors: np.ndarray, cell: int | None, side: int) -> Image.Image:
    """Each color as a square of `cell` pixels, by default to `side` in all, with white lines if large."""
    cell = -(-side // max(colors.shape[:2])) if cell is None else cell
    if cell < 1:
        raise ValueError(f"cell must be at least 1 pixel, got {cell}")
    pixels = colors.repeat(cell, 0).repeat(cell, 1)
    if cell >= 6:
        pixels[::cell], pixels[:, ::cell] = 255, 255
    return Image.fromarray(pixels)

"""The attention masks as the paper draws them (Figure 11), at its small size or any other.

A line of a mask is a query, a column a key. Keys of the text and of the image that the query sees have colors of
their own; what it does not see is pale.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dalle.io.images import captioned_grid
from dalle.layout import TokenLayout
from dalle.masks import visible
from dalle.nn.sparse_mask import SparseMask

FIGURE_11 = TokenLayout(text_len=6, grid=4, text_vocab=1, image_vocab=1)
"""The lengths of the paper's drawing: 6 text tokens and 4 x 4 image tokens; its convolution is 3 wide."""
HIDDEN, TEXT, IMAGE, QUERY = (233, 236, 240), (242, 153, 74), (45, 108, 181), (192, 40, 60)
SIDE = 352
"""Pixels of a mask's image, at least."""


def mask_image(
    kind: str,
    layout: TokenLayout = FIGURE_11,
    kernel: int = 3,
    transposed: bool = False,
    cell: int | None = None,
) -> Image.Image:
    """Who sees whom in layers of one kind.

    Args:
        kind: "row", "column", "conv" or "causal".
        layout: lengths of the stream; the paper's drawing unless given, `model.transformer.layout` for a model's.
        kernel: side of the convolution; the paper's model has 11.
        transposed: image slots column by column, as the paper computes column layers (Figure 11c).
        cell: pixels on a side of a query and key; so that the whole is at least `SIDE` unless given.

    Raises:
        ValueError: as `dalle.masks.visible`; a cell below 1.
    """
    cell = _cell(cell, layout.seq_len, SIDE)
    pattern = SparseMask(kind, layout, kernel)
    sees = pattern.dense(torch.device("cpu"))
    if transposed:
        sees = pattern.transposed(
            pattern.transposed(sees).T
        ).T  # keys of each query, then queries of each key
    colors = _colors(sees, torch.arange(layout.seq_len) < layout.text_len)
    return _tiles(colors, cell)


def figure_11(layout: TokenLayout = FIGURE_11, kernel: int = 3, cell: int | None = None) -> Image.Image:
    """The four masks of Figure 11 with their names: row, column, column transposed, causal convolution."""
    names = {
        "(a) row": ("row", False),
        "(b) column": ("column", False),
        "(c) column, image slots transposed": ("column", True),
        f"(d) causal convolution, {kernel} x {kernel}": ("conv", False),
    }
    cells = [(name, mask_image(kind, layout, kernel, turned, cell)) for name, (kind, turned) in names.items()]
    return captioned_grid(cells, columns=2)


def reach_image(
    kind: str, layout: TokenLayout, row: int, column: int, kernel: int = 11, cell: int | None = None
) -> Image.Image:
    """The grid of image slots, and which of them the slot at (row, column) sees; that slot itself is red.

    Raises:
        ValueError: a place beyond the grid; as `mask_image`.
    """
    if not (0 <= row < layout.rows and 0 <= column < layout.columns):
        raise ValueError(
            f"place must lie in the grid of {layout.rows} x {layout.columns}, got ({row}, {column})"
        )
    slots = torch.arange(layout.num_image_tokens) + layout.text_len
    query = layout.text_len + row * layout.columns + column
    sees = visible(kind, layout, kernel)(torch.tensor(query), slots).view(layout.grid)
    colors = _colors(sees, torch.zeros(layout.columns, dtype=torch.bool))
    colors[row, column] = QUERY
    return _tiles(colors, _cell(cell, max(layout.grid), 192))


def _cell(cell: int | None, count: int, side: int) -> int:
    if cell is not None and cell < 1:
        raise ValueError(f"cell must be at least 1 pixel, got {cell}")
    return cell or -(-side // count)


def _colors(sees: Tensor, is_text: Tensor) -> np.ndarray:
    """bool (Q, K) and which keys are text (K,) -> uint8 (Q, K, 3)."""
    shown = np.where(is_text[None, :, None], np.uint8(TEXT), np.uint8(IMAGE))
    return np.where(sees[:, :, None], shown, np.uint8(HIDDEN))


def _tiles(colors: np.ndarray, cell: int) -> Image.Image:
    """Each color as a square; with white lines between them where there is room."""
    height, width = colors.shape[:2]
    image = Image.fromarray(colors).resize((width * cell, height * cell), Image.Resampling.NEAREST)
    if cell >= 6:
        pen = ImageDraw.Draw(image)
        for x in range(width + 1):
            pen.line([(x * cell, 0), (x * cell, height * cell)], fill="white")
        for y in range(height + 1):
            pen.line([(0, y * cell), (width * cell, y * cell)], fill="white")
    return image

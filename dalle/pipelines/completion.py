"""Image completion: the tokens of an image that are kept while the rest is generated (paper section 3.3)."""

from typing import Any

from torch import Tensor

from dalle.io.images import ImageSource
from dalle.transformer.generate import TO_GENERATE


def prefix_tokens(
    model: Any,
    image: ImageSource | Tensor,
    rows: int | None = None,
    box: tuple[int, int] | None = None,
) -> Tensor:
    """Image tokens (1, h * w) with TO_GENERATE below `rows` or inside `box`; arguments as `DALLE.complete`.

    Raises:
        ValueError: rows or a box beyond the grid, both, or neither.
    """
    height, width = model.transformer.layout.grid
    if (rows is None) == (box is None):
        raise ValueError("give either rows, how many to keep, or box, (top, left) of the region to generate")
    if rows is not None and not 0 < rows < height:
        raise ValueError(f"rows must be 1 to {height - 1}, got {rows}")
    top, left = box or (rows, 0)
    if not (0 <= top < height and 0 <= left < width) or (top, left) == (0, 0):
        raise ValueError(f"box must be (top, left) within {height} x {width} and not (0, 0), got {box}")
    tokens = image.to(model.device) if isinstance(image, Tensor) else model.encode(image)
    grid = tokens.view(1, height, width).clone()
    grid[:, top:, left:] = TO_GENERATE
    return grid.flatten(1)

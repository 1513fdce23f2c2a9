"""Image completion: the tokens of an image that are kept while the rest is generated (paper section 3.3)."""

from typing import Any

from torch import Tensor

from dalle.io.images import ImageSource
from dalle.layout import check_tokens
from dalle.pipelines.generation import Generation
from dalle.sampling import whole_numbers
from dalle.transformer.generate import TO_GENERATE


def complete(
    model: Any,
    prompt: str,
    image: ImageSource | Tensor,
    rows: int | None = None,
    box: tuple[int, int] | None = None,
    **options,
) -> Generation:
    """As `generate`, keeping the top rows of tokens of an image, or all outside a box (section 3.3).

    Args:
        image: its center square is resized to the model's size; or image tokens (1, h * w), kept exactly.
        rows: rows of tokens to keep, 1 to the grid's rows - 1.
        box: instead, (top, left) in tokens of the region to generate, which extends to the lower right
            corner. A token depends on the kept ones before it in raster order alone.
        options: as `generate`.
    """
    return model.generate(prompt, prefix=prefix_tokens(model, image, rows, box), **options)


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
    if rows is not None:
        (rows,) = whole_numbers(rows=rows)
        if not 0 < rows < height:
            raise ValueError(f"rows must be 1 to {height - 1}, got {rows}")
    elif not hasattr(box, "__len__") or len(box) != 2:
        raise ValueError(f"box must be (top, left) within {height} x {width}, got {box!r:.100}")
    top, left = (rows, 0) if box is None else whole_numbers(top=box[0], left=box[1])
    if not (0 <= top < height and 0 <= left < width) or (top, left) == (0, 0):
        raise ValueError(f"box must be (top, left) within {height} x {width} and not (0, 0), got {box}")
    tokens = image.to(model.device) if isinstance(image, Tensor) else model.encode(image)
    check_tokens(tokens, model.transformer.layout.image_vocab, "image tokens")
    if tokens.shape != (1, height * width):
        raise ValueError(f"image tokens of one image are (1, {height * width}), got {tuple(tokens.shape)}")
    kept = tokens.view(1, height, width).clone()
    kept[:, top:, left:] = TO_GENERATE
    return kept.flatten(1)

"""Image I/O: load, resize, convert to and from tensors, grids. Pixels are float (B, 3, H, W) in [0, 1]."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor


def load_image(source: Path | str | Image.Image) -> Image.Image:
    """Loads an RGB image: EXIF rotation applied, alpha over white, 16 bit scaled to 8.

    Raises:
        ValueError: not an image, or a truncated one.
    """
    name = "this" if isinstance(source, Image.Image) else source
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
    except FileNotFoundError:
        raise ValueError(f"no image at {name}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {name} as an image: {error}") from None
    with contextlib.suppress(Exception):  # an EXIF block that cannot be read says nothing
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError(f"cannot read {name} as an image: its values are floats; save it in 8 bits")
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        values = np.asarray(image, dtype=np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"cannot read {name} as an image: its values go from {values.min():.0f} to "
                f"{values.max():.0f}; save it in 8 or 16 bits"
            )
        return Image.fromarray((values / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def resize_center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Evaluation preprocessing of the release: shorter side to R by Lanczos, then the middle square."""
    if min(image.size) < 8:
        raise ValueError(
            f"image of {image.width} x {image.height} is too small; expected 8 pixels or more a side"
        )
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size -> float32 (B, 3, H, W) in [0, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """float (B, 3, H, W) in [0, 1] -> 8-bit RGB images."""
    arrays = (pixels.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def check_images(pixels: Tensor, multiple_of: int = 1) -> None:
    """ValueError unless pixels are float (B, 3, H, W), finite, in [0, 1], sides a multiple."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be (B, 3, H, W), got {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise ValueError(f"pixels must be float in [0, 1], got {pixels.dtype}; divide uint8 images by 255")
    if not pixels.numel():
        raise ValueError(f"pixels must hold an image, got none: {tuple(pixels.shape)}")
    if pixels.shape[2] % multiple_of or pixels.shape[3] % multiple_of:
        raise ValueError(
            f"image sides must be multiples of {multiple_of}, got {tuple(pixels.shape[2:])}; crop or resize "
            "first"
        )
    low, high = map(float, pixels.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixels hold NaN or infinite values")
    if low < -1e-3 or high > 1 + 1e-3:
        hint = "divide by 255" if high > 2 else "map [-1, 1] by (x + 1) / 2" if low < 0 else "clamp to [0, 1]"
        raise ValueError(f"pixels must lie in [0, 1], got [{low:.3g}, {high:.3g}]; {hint}")


def image_grid(rows: Sequence[Sequence[Image.Image]], scale: int = 1, gap: int = 4) -> Image.Image:
    """A grid of equal images on white, each enlarged `scale` times without smoothing."""
    width, height = (side * scale for side in rows[0][0].size)
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (columns * (width + gap) + gap, len(rows) * (height + gap) + gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            tile = image.resize((width, height), Image.Resampling.NEAREST)
            page.paste(tile, (gap + x * (width + gap), gap + y * (height + gap)))
    return page


def captioned_grid(cells: Sequence[tuple[str, Image.Image]], columns: int, scale: int = 1) -> Image.Image:
    """Images with their captions under them, wrapped to the image's width."""
    font = ImageFont.load_default(12)
    width, height = (side * scale for side in cells[0][1].size)
    texts = [_wrap(caption, font, width) for caption, _ in cells]
    text_height = 15 * max(len(text) for text in texts) + 6
    tiles = []
    for (_, image), text in zip(cells, texts, strict=True):
        tile = Image.new("RGB", (width, height + text_height), "white")
        tile.paste(image.resize((width, height), Image.Resampling.NEAREST))
        for n, words in enumerate(text):
            ImageDraw.Draw(tile).text((0, height + 4 + n * 15), words, fill="black", font=font)
        tiles.append(tile)
    return image_grid([tiles[i : i + columns] for i in range(0, len(tiles), columns)], gap=10)


def _wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines

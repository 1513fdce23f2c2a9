"""Image I/O: load, resize, convert to and from tensors, grids. Pixels are float (B, 3, H, W) in [0, 1]."""

import contextlib
import io
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI"]
FORMATS += ["DDS", "DIB", "ICO", "PCX", "SGI", "TGA"]
"""Raster formats, the only ones opened: for others Pillow may start a program, as Ghostscript for EPS."""
ImageSource = Image.Image | np.ndarray | Path | str


def identify_image(data: bytes) -> Image.Image:
    """The image in a file of one of FORMATS, not yet decoded; raises what Pillow raises."""
    Image.init()
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # of 64 MiB: a long text is no bomb
    image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    if image.format == "PNG" and "transparency" in image.info:  # in the bits of the file, pixels have 8
        key, bits = image.info["transparency"], data[24]
        if image.mode == "L":
            image.info["transparency"] = key * 255 // (2**bits - 1)
        elif image.mode == "RGB":
            image.info["transparency"] = tuple(value >> (bits - 8) for value in key)
    return image


def load_image(source: ImageSource) -> Image.Image:
    """Loads an image (`to_rgb`) of a file, or uint8 (H, W, 3); ValueError names what cannot be read."""
    name = source if isinstance(source, Path | str) else "this"
    try:
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.shape[2:] != (3,):
                raise ValueError(f"expected an array uint8 (H, W, 3), got {source.dtype} {source.shape}")
            return Image.fromarray(source)
        if not isinstance(source, Image.Image | Path | str):
            raise ValueError(f"expected an image, an array or a path, got {type(source).__name__}")
        image = source if isinstance(source, Image.Image) else identify_image(Path(source).read_bytes())
        return to_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"no image at {name}") from None
    except UnidentifiedImageError:
        raise ValueError(f"cannot read {name} as an image: expected one of {', '.join(FORMATS)}") from None
    except Exception as error:  # a decoder may raise anything
        raise ValueError(f"cannot read {name} as an image: {error or type(error).__name__}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes to RGB: EXIF rotation applied, colors in sRGB, alpha over white, 16 bit scaled to 8."""
    image.load()
    with contextlib.suppress(Exception):  # an EXIF block that cannot be read says nothing
        image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise ValueError("its values are floats; save it in 8 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            limits = f"{values.min()} to {values.max()}"
            raise ValueError(f"its values go from {limits}; save it in 8 or 16 bits")
        gray = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        alpha = np.uint8(255) * (values != image.info.get("transparency"))
        image = Image.fromarray(np.stack([gray, alpha], -1))
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    rgb = image.convert(mode)
    with contextlib.suppress(Exception):  # neither does a damaged ICC profile, or one of another mode
        rgb = _srgb_transform(profile, mode).apply(rgb) if profile else rgb
    rgb = rgb.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgb.putalpha(image.convert("RGBA").getchannel("A"))
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    rgb.info.pop("icc_profile", None)
    return rgb


@lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "sRGB" in (source.profile.profile_description or ""):
        raise ValueError("nothing to convert")
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def resize_center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Evaluation preprocessing of the release: shorter side to R by Lanczos, then the middle square."""
    if min(image.size) < 8:
        raise ValueError(f"image of {image.width} x {image.height} is too small; expected 8 pixels or more")
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
    """ValueError unless pixels are float (B, 3, H, W), finite, in [0, 1], sides a multiple.

    The host reads the range, and so waits for a GPU; a training step checks the shape alone.
    """
    check_image_shape(pixels, multiple_of)
    low, high = map(float, pixels.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixels hold NaN or infinite values")
    if low < -1e-3 or high > 1 + 1e-3:
        hint = "divide by 255" if high > 2 else "map [-1, 1] by (x + 1) / 2" if low < 0 else "clamp to [0, 1]"
        raise ValueError(f"pixels must lie in [0, 1], got [{low:.3g}, {high:.3g}]; {hint}")


def check_image_shape(pixels: Tensor, multiple_of: int = 1) -> None:
    """ValueError unless pixels are float (B, 3, H, W), sides a multiple."""
    if not isinstance(pixels, Tensor):
        raise ValueError(f"pixels must be a tensor (B, 3, H, W), got {type(pixels).__name__}; see to_tensor")
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be (B, 3, H, W), got {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise ValueError(f"pixels must be float in [0, 1], got {pixels.dtype}; divide uint8 images by 255")
    if not pixels.numel():
        raise ValueError(f"pixels must hold an image, got none: {tuple(pixels.shape)}")
    if pixels.shape[2] % multiple_of or pixels.shape[3] % multiple_of:
        raise ValueError(f"sides must be multiples of {multiple_of}, got {tuple(pixels.shape[2:])}; resize")


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

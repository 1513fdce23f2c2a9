"""Decoding of an image file to RGB, or the cause why it cannot be decoded."""

import io

from PIL import Image, UnidentifiedImageError

from dalle.data.bad_samples import BadSampleError
from dalle.io.images import load_image

MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
"""First bytes of a JPEG, PNG, GIF, WebP, BMP or TIFF."""
MAX_PIXELS = 2**30 // 12
"""A larger image (10,000 x 9,000), more than a quarter of a gigabyte, is taken for a decompression bomb.
Pillow warns from here on, and refuses twice as many itself."""
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
ERRORS = (*BOMBS, OSError, SyntaxError, ValueError, EOFError, IndexError)
"""What Pillow raises for a broken image."""


def open_image(data: bytes, name: str) -> Image.Image:
    """The image with its header read, not yet decoded; BadSampleError if it cannot be opened."""
    if not data:
        raise BadSampleError(name, "truncated", "no bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        cause = "unreadable image" if data.startswith(MAGIC) else "wrong type"
        raise BadSampleError(name, cause, f"begins {data[:8]!r}") from None
    except ERRORS as error:
        raise BadSampleError(name, _cause(error), str(error)) from None
    if image.width * image.height > MAX_PIXELS:
        detail = f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}"
        raise BadSampleError(name, "decompression bomb", detail)
    return image


def decode(image: Image.Image, name: str, side: int | None = None) -> Image.Image:
    """An image from `open_image` as RGB; BadSampleError if it cannot be decoded.

    With `side` a JPEG may be decoded at 1/2, 1/4 or 1/8 as long as each side keeps this many pixels: blocks
    of pixels are averaged, in a fraction of the time.
    """
    try:
        if side:
            image.draft(None, (side, side))
        image.load()
        return load_image(image)
    except ERRORS as error:
        raise BadSampleError(name, _cause(error), str(error)) from None


def _cause(error: Exception) -> str:
    text = str(error).lower()
    if isinstance(error, BOMBS) or "decompressed data too large" in text:
        return "decompression bomb"
    return "truncated" if "truncated" in text or isinstance(error, EOFError) else "unreadable image"

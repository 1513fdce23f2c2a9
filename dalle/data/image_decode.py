"""Decoding of an image file to RGB, or the cause why it cannot be decoded."""

from PIL import Image, UnidentifiedImageError

from dalle.data.bad_samples import BadSampleError
from dalle.io.images import identify_image, to_rgb

MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
"""First bytes of a JPEG, PNG, GIF, WebP, BMP or TIFF."""
MAX_PIXELS = 2**30 // 12
"""A larger image (10,000 x 9,000) is a decompression bomb; Pillow warns from here, refuses twice as many."""
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def open_image(data: bytes, name: str) -> Image.Image:
    """The image with its header read, not yet decoded; BadSampleError if it cannot be opened."""
    if not data:
        raise BadSampleError(name, "truncated", "no bytes")
    try:
        image = identify_image(data)
    except UnidentifiedImageError:
        cause = "unreadable image" if data.startswith(MAGIC) or data[4:12] == b"ftypavif" else "wrong type"
        raise BadSampleError(name, cause, f"begins {data[:8]!r}") from None
    except Exception as error:  # a decoder may raise anything
        raise _bad_image(name, error) from None
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
        return to_rgb(image)
    except Exception as error:
        raise _bad_image(name, error) from None


def _bad_image(name: str, error: Exception) -> BadSampleError:
    text = str(error) or type(error).__name__
    text = "its text is larger than 64 MiB; save it without" if "MAX_TEXT" in text else text
    truncated = "truncated" in text.lower() or isinstance(error, EOFError)
    cause = "truncated" if truncated else "unreadable image"
    return BadSampleError(name, "decompression bomb" if isinstance(error, BOMBS) else cause, text)

"""From the bytes of a file to an RGB image, or to the cause why not."""

import io

from PIL import Image, UnidentifiedImageError

from dalle.data.bad_samples import BadSampleError
from dalle.io.images import load_image

MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
"""How a JPEG, PNG, GIF, WebP, BMP or TIFF begins."""

MOST_PIXELS = 2**30 // 12
"""A larger image (10,000 x 9,000) takes more than a quarter of a gigabyte and is taken for a bomb. Pillow warns from
here on, and refuses twice as many itself."""


def open_image(data: bytes, name: str) -> Image.Image:
    """The image with its header read, not yet decoded; BadSampleError says why not."""
    if not data:
        raise BadSampleError(name, "truncated", "no bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSampleError(name, "decompression bomb", str(error)) from None
    except UnidentifiedImageError:
        known = data.startswith(MAGIC)
        raise BadSampleError(
            name, "unreadable image" if known else "wrong type", f"begins {data[:8]!r}"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise BadSampleError(name, _cause(error), str(error)) from None
    if image.width * image.height > MOST_PIXELS:
        raise BadSampleError(
            name, "decompression bomb", f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}"
        )
    return image


def decode(image: Image.Image, name: str, side: int | None = None) -> Image.Image:
    """An opened image as RGB; BadSampleError says why not.

    Args:
        image: from `open_image`.
        name: for the message.
        side: a JPEG may come out smaller by 2, 4 or 8 as long as it keeps so many pixels a side. The decoder
            averages whole blocks of pixels then, in a fraction of the time.
    """
    try:
        if side:
            image.draft(None, (side, side))
        image.load()
        return load_image(image)
    except Image.DecompressionBombError as error:
        raise BadSampleError(name, "decompression bomb", str(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise BadSampleError(name, _cause(error), str(error)) from None


def _cause(error: Exception) -> str:
    said = str(error).lower()
    if "decompressed data too large" in said:
        return "decompression bomb"
    return "truncated" if "truncated" in said or isinstance(error, EOFError) else "unreadable image"

"""From the bytes of a file to an RGB picture, or to the cause why not."""

import io

from PIL import Image, UnidentifiedImageError

from dalle.data.skipped import Unusable
from dalle.images import load_image

MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
"""How a JPEG, PNG, GIF, WebP, BMP or TIFF begins."""


def open_picture(picture: bytes, name: str) -> Image.Image:
    """The picture with its header read, not yet decoded; Unusable says why not."""
    if not picture:
        raise Unusable(name, "truncated", "no bytes")
    try:
        return Image.open(io.BytesIO(picture))
    except Image.DecompressionBombError as error:
        raise Unusable(name, "decompression bomb", str(error)) from None
    except UnidentifiedImageError:
        known = picture.startswith(MAGIC)
        raise Unusable(name, "unreadable picture" if known else "wrong type", f"begins {picture[:8]!r}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise Unusable(name, _cause(error), str(error)) from None


def decode(image: Image.Image, name: str, side: int | None = None) -> Image.Image:
    """An opened picture as RGB; Unusable says why not.

    Args:
        image: from `open_picture`.
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
        raise Unusable(name, "decompression bomb", str(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise Unusable(name, _cause(error), str(error)) from None


def _cause(error: Exception) -> str:
    said = str(error).lower()
    if "decompressed data too large" in said:
        return "decompression bomb"
    return "truncated" if "truncated" in said or isinstance(error, EOFError) else "unreadable picture"

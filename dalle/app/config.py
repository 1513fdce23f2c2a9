"""Limits of the web page's requests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Upper bounds of a request."""

    caption: int = 1000
    """Characters of a caption."""
    images: int = 16
    """Images to keep."""
    candidates: int = 512
    """Candidates, as many as in the paper."""
    upload: int = 10 * 2**20
    """Bytes of an uploaded image."""
    pixels: int = 25_000_000
    """Pixels of an uploaded image."""

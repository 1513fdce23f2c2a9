"""Text that says something: neither blank nor the mark of a missing value."""

import re

VISIBLE = re.compile(
    r"[^\s\0-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff]"
)
"""A character that shows; a zero-width space, U+200B, does not."""
MISSING = ("nan", "none", "null", "n/a", "#n/a", "<na>")
"""How tables write a missing value, in any case."""


def is_caption(text: str) -> bool:
    """Whether text is neither blank nor MISSING."""
    return bool(VISIBLE.search(text)) and text.strip().lower() not in MISSING

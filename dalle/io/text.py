"""Text from files: captions that say something, and JSON of any origin."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

VISIBLE = re.compile(
    r"[^\s\0-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff]"
)
"""A character that shows; a zero-width space, U+200B, does not."""
MISSING = ("nan", "none", "null", "n/a", "#n/a", "<na>")
"""How tables write a missing value, in any case."""


MAX_CAPTION, MAX_LINE = 2**17, 2**24
"""Characters of a caption, and of a line of a table or list; the first is that of a field in Python's csv."""


def is_caption(text: str) -> bool:
    """Whether text is neither blank nor MISSING nor longer than MAX_CAPTION."""
    return len(text) <= MAX_CAPTION and bool(VISIBLE.search(text)) and text.strip().lower() not in MISSING


def read_lines(file: TextIO) -> Iterator[str]:
    """The lines of a text file; of one longer than MAX_LINE only as much."""
    while line := file.readline(MAX_LINE):
        rest = line
        while len(rest) == MAX_LINE and rest[-1] not in "\r\n":
            rest = file.readline(MAX_LINE)
        yield line


def parse_json(text: str | bytes, place: str) -> Any:
    """JSON of any origin; ValueError that names the place, also where it is too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested dicts by dotted name; a list is one value."""
    flat = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat

"""Captions to draw, from a file that is read a line at a time: text, or JSON lines."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

JSON_LINES = (".jsonl", ".ndjson")
KEYS = ("prompt", "caption")


def read_captions(path: Path) -> Iterator[str]:
    """Captions in the order of the file: one a line, or of JSON lines the field "prompt" or "caption".

    Raises:
        ValueError: no such file, a line without a caption; the line is named.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                yield _caption(line, path, number)
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}); give a text file, a caption a line"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8; save it so") from None


def _caption(line: str, path: Path, number: int) -> str:
    caption = line.strip()
    if path.suffix in JSON_LINES:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        found = [record[key] for key in KEYS if isinstance(record, dict) and isinstance(record.get(key), str)]
        if not found:
            raise ValueError(f'{path}, line {number} has no "prompt" or "caption"')
        caption = " ".join(found[0].split())
    if not caption:
        raise ValueError(f"{path}, line {number} holds no caption; take the line out")
    return caption


def check_captions(path: Path, check: Callable[[str], object]) -> tuple[int, str]:
    """Reads the whole file once: how many captions, and a hash of them.

    Args:
        check: called with each; its ValueError is told with the line.
    """
    count, digest = 0, hashlib.sha256()
    for count, caption in enumerate(read_captions(path), start=1):
        try:
            check(caption)
        except ValueError as error:
            raise ValueError(f"{path}, line {count}: {error}") from None
        digest.update(f"{caption}\n".encode())
    if not count:
        raise ValueError(f"{path} holds no captions")
    return count, digest.hexdigest()[:16]


def groups(path: Path, size: int) -> Iterator[tuple[int, list[str]]]:
    """(number of the first, captions), so many at a time."""
    captions, first = read_captions(path), 0
    while some := list(islice(captions, size)):
        yield first, some
        first += len(some)


def words(caption: str, length: int = 60) -> str:
    """A file name's part for any caption: its letters a-z and digits, joined by "-"; "caption" if it has none."""
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:length].rstrip("-") or "caption"

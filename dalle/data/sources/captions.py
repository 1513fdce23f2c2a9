"""Captions as stored on disk: lines of text, JSON, columns of a table."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dalle.data.bad_samples import BadSampleError
from dalle.io.text import NOT_UTF8, is_caption, parse_json

CAPTION_NAMES = ("captions", "caption", "text", "txt", "title", "description", "prompt", "sentence", "label")
IMAGE_NAMES = (
    *("image", "img", "picture", "photo", "file_name", "filename", "filepath", "file_path", "image_path"),
    *("path", "file", "jpg", "jpeg", "png", "webp"),
)
"""Usual column names, tried in this order, in any case."""


def parse_text(data: bytes, name: str) -> list[str]:
    """One caption per line, without blank lines and byte order mark."""
    return flatten_captions(_decode(data, name).replace("\r", "\n").split("\n"))


def parse_json_captions(data: bytes, name: str, columns: str | None = None) -> list[str]:
    """A caption, a list of them, or a mapping with one of CAPTION_NAMES or the given keys."""
    text = _decode(data, name)
    try:
        value = parse_json(text, "it")
    except ValueError as error:
        raise BadSampleError(name, "broken row", str(error)) from None
    if isinstance(value, Mapping):
        keys = [word.strip() for word in columns.split(",")] if columns else [find_name(value, CAPTION_NAMES)]
        value = [value.get(key) for key in keys]
    return check_utf8(flatten_captions(value), name)


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(name, "caption not UTF-8", str(error)) from None


def flatten_captions(value: Any) -> list[str]:
    """The captions in text and nested lists of text; blank text and other values hold none.

    Bytes that are not UTF-8 become lone surrogates, which `check_utf8` finds.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return [value.strip()] if is_caption(value) else []
    if isinstance(value, list | tuple):
        return [caption for inner in value for caption in flatten_captions(inner)]
    return []


def arrow_rows(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of an Arrow batch or table; None for one with text that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        half = len(batch) // 2
        return arrow_rows(batch.slice(0, half)) + arrow_rows(batch.slice(half)) if half else [None]


def check_utf8(captions: list[str], name: str) -> list[str]:
    """The captions; BadSampleError if one of them was not UTF-8."""
    if wrong := next(filter(NOT_UTF8.search, captions), None):
        raise BadSampleError(name, "caption not UTF-8", f"{wrong!r:.80}")
    return captions


def find_name(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The first of the wanted names that is there, in any case."""
    lower = {str(name).lower(): name for name in reversed(list(names))}
    return next((lower[name] for name in wanted if name in lower), None)


def check_column_names(names: list[str], table: str) -> None:
    """ValueError if several columns have the same name."""
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise ValueError(f"{table} has several columns named {', '.join(map(repr, twice)):.400}; rename them")


def choose_columns(
    names: list[str], image: str | None, caption: str | None, table: str
) -> tuple[str, list[str]]:
    """The column of images and those of captions (several, with commas); ValueError lists the columns."""
    image = image or find_name(names, IMAGE_NAMES)
    captions = [word.strip() for word in caption.split(",")] if caption else [find_name(names, CAPTION_NAMES)]
    for kind, columns in (("image", [image]), ("caption", captions)):
        for column in columns:
            if column not in names:
                problem = f"no column {column!r}" if column else f"no column with a usual name for {kind}s"
                there = ", ".join(map(repr, names))
                raise ValueError(f"{table} has {problem}, only {there:.400}; give --data.{kind}-column")
    return image, captions

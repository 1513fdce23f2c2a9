"""Captions as people store them: lines of text, JSON, columns of a table."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dalle.data.bad_samples import BadSampleError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What is taken for an image."""
CAPTION_NAMES = ("captions", "caption", "text", "txt", "title", "description", "prompt", "sentence", "label")
IMAGE_NAMES = (
    "image",
    "img",
    "image",
    "photo",
    "file_name",
    "filename",
    "filepath",
    "file_path",
    "image_path",
    "path",
    "file",
    "jpg",
    "jpeg",
    "png",
    "webp",
)
"""Names of columns that are tried in this order, in any case."""


def from_text(data: bytes, name: str) -> list[str]:
    """One caption a line; blank lines and a byte order mark are none."""
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise BadSampleError(name, "caption not UTF-8", str(error)) from None
    return [line for line in lines if line]


def from_json(data: bytes, name: str, columns: str | None = None) -> list[str]:
    """A caption, a list of them, or a mapping with one of CAPTION_NAMES or the columns given."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSampleError(name, "caption not UTF-8", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadSampleError(name, "broken row", f"no JSON: {error}") from None
    if isinstance(value, Mapping):
        keys = [word.strip() for word in columns.split(",")] if columns else [find_name(value, CAPTION_NAMES)]
        value = [value.get(key) for key in keys]
    return listed(value)


def listed(value: Any) -> list[str]:
    """Captions out of text, lists of text, at any depth; whatever else stands there is none.

    Bytes are UTF-8; what is not is kept as lone surrogates, for `check_utf8` to find.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, list | tuple):
        return [caption for inner in value for caption in listed(inner)]
    return []


def check_utf8(captions: list[str], name: str) -> list[str]:
    """The captions; BadSampleError where one holds bytes that were no text."""
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(name, "caption not UTF-8", str(error)) from None
    return captions


def find_name(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The first of the wanted names that is there, in any case."""
    lower = {str(name).lower(): name for name in reversed(list(names))}
    return next((lower[name] for name in wanted if name in lower), None)


def check_names(names: list[str], place: str) -> None:
    """ValueError names the columns that are there more than once; nobody could say which is meant."""
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise ValueError(
            f"{place} has several columns of the name {', '.join(map(repr, twice))}; rename all but one"
        )


def choose_columns(
    names: list[str], image: str | None, caption: str | None, place: str
) -> tuple[str, list[str]]:
    """The column of images and those of captions (several, with commas); ValueError lists what there is."""
    image = image or find_name(names, IMAGE_NAMES)
    captions = [word.strip() for word in caption.split(",")] if caption else [find_name(names, CAPTION_NAMES)]
    for what, columns in (("image", [image]), ("caption", captions)):
        for column in columns:
            if column not in names:
                problem = f"no column {column!r}" if column else f"no column that sounds like {what} data"
                raise ValueError(
                    f"{place} has {problem}, only {', '.join(map(repr, names))}; name it by --data.{what}-column"
                )
    return image, captions

"""Text and JSON of any origin: captions that say something, files, one item at a time of a long list."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TextIO

VISIBLE = re.compile(
    r"[^\s\0-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff]"
)
"""A character that shows; a zero-width space, U+200B, does not."""
NOT_UTF8 = re.compile("[\ud800-\udfff]")
"""A lone surrogate: how Python holds a byte that is not UTF-8."""
MISSING = ("nan", "none", "null", "n/a", "#n/a", "<na>")
"""How tables write a missing value, in any case."""
MAX_DEPTH = 100
"""Of JSON lists and objects inside each other."""
PART, MAX_ITEM = 2**20, 2**25
"""Characters of a JSON file that are read at once, and of an item at most."""
SPACES = re.compile(r"[ \t\r\n]*")
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


def check_text(text: str) -> None:
    """TypeError for anything but a str; ValueError if it cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise TypeError(f"a caption must be a str, not {type(text).__name__}: {text!r:.80}")
    if NOT_UTF8.search(text):
        raise ValueError(f"expected text in UTF-8, got bytes of another encoding in {text!r:.80}")


def read_text(path: Path, expected: str) -> str:
    """A UTF-8 file without byte order mark, each line ended by \\n; ValueError says what was expected."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}); expected {expected}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; save it as UTF-8, expected {expected}") from None


def parse_json(text: str | bytes, place: str) -> Any:
    """JSON of any origin; ValueError names the place: also if it is too deep, or has a key twice."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        return _check_depth(DECODER.decode(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested dicts by dotted name; a list is one value."""
    flat = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def json_items(file: TextIO, key: str, place: str) -> Iterator[Any]:
    """The items of the list `key` of a JSON object, one in memory at a time; ValueError names the line."""
    text, names = _JSONFile(file, place), set[str]()
    for _ in text.commas("{", "}"):
        name = text.value()
        if not isinstance(name, str) or name in names:
            text.fail(f"{name!r:.80} is no name, or is there twice")
        names.add(name)
        text.mark(":")
        if text.peek() == "[":
            for _ in text.commas("[", "]"):
                item = text.value()
                if name == key:
                    yield item
        else:
            text.value()
    if text.peek():
        text.fail("more than one value")


class _JSONFile:
    """A JSON file read in parts; `at` is the position in the part `text`."""

    def __init__(self, file: TextIO, place: str):
        self.file, self.place = file, place
        self.text, self.at, self.line = "", 0, 1

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        """ValueError with the line of a position."""
        line = self.line + self.text.count("\n", 0, self.at if at is None else at)
        problem = f"truncated, or not JSON as expected ({problem})"
        raise ValueError(f"{self.place}, line {line}: {problem}; get the file again")

    def more(self) -> bool:
        """Drops what is done and reads at least as much as is left; False at the end of the file."""
        part = self.file.read(max(PART, len(self.text) - self.at))
        if part:
            self.line += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :] + part, 0
        return bool(part)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        self.at = SPACES.match(self.text, self.at).end()
        while self.at == len(self.text) and self.more():
            self.at = SPACES.match(self.text).end()
        return self.text[self.at : self.at + 1]

    def mark(self, marks: str) -> str:
        """Passes one of these characters, and returns it."""
        found = self.peek()
        if not found or found not in marks:
            self.fail(f"expected {' or '.join(marks)}")
        self.at += 1
        return found

    def commas(self, first: str, last: str) -> Iterator[None]:
        """A step for each item between two brackets; the caller reads it."""
        self.mark(first)
        mark = self.mark(last) if self.peek() == last else ","
        while mark == ",":
            yield
            mark = self.mark(f",{last}")

    def value(self) -> Any:
        """The next value; one that ends with the part may continue in the next."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or not self.more():
                    self.at = end
                    return _check_depth(value)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > MAX_ITEM or not self.more():
                    self.fail(error.msg, error.pos)
            except (ValueError, RecursionError) as error:
                self.fail(str(error))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r:.80} is there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _check_depth(value: Any) -> Any:
    """The value; ValueError if it is deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [one for one in level if isinstance(one, dict | list)]
        if not inner:
            return value
        level = list(chain.from_iterable(one.values() if isinstance(one, dict) else one for one in inner))
    raise ValueError(f"lists and objects are more than {MAX_DEPTH} deep inside each other")

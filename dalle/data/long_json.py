"""JSON too long to be read at once: the lists in one large object, one element in memory at a time."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 16
LONGEST = 1 << 26  # characters that one value may have


def open_text(file: Path) -> io.TextIOBase:
    """A text file, also one packed by gzip; bytes that are no UTF-8 stay as lone surrogates, to be counted later."""
    unpack = gzip.open if file.suffix == ".gz" else open
    return unpack(file, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def json_items(file: Path, name: str) -> Iterator[dict[str, Any]]:
    """The objects in the array `name` of a JSON file that is one object; one of them in memory at a time.

    Raises:
        ValueError: not such a file, no such array, or one that breaks off.
    """
    found = False
    with open_text(file) as text:
        reader = _JSONReader(text, file)
        reader.take("{")
        while reader.peek() != "}":
            key = reader.value()
            reader.take(":")
            if reader.peek() != "[":
                reader.value()
            else:
                found = found or key == name
                for item in reader.elements():
                    if key == name and isinstance(item, dict):
                        yield item
            if reader.peek() == ",":
                reader.take(",")
    if not found:
        raise ValueError(f"{file} has no list {name!r}; is it of this format?")


class _JSONReader:
    """A JSON text piece by piece: a whole value is decoded at once, a list one element at a time."""

    def __init__(self, text: io.TextIOBase, file: Path):
        self.text, self.file, self.buffer, self.at, self.ended = text, file, "", 0, False
        self.decode = json.JSONDecoder().raw_decode

    def _more(self) -> None:
        left = self.buffer[self.at :]
        if len(left) > LONGEST:
            raise ValueError(
                f"{self.file} is not JSON, or one value in it is longer than {LONGEST} characters"
            )
        read = self.text.read(
            max(CHUNK, len(left))
        )  # twice as much each time: a long value is not read over and over
        self.buffer, self.at, self.ended = left + read, 0, not read

    def peek(self) -> str:
        """The next character that is no white space."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            self._more()
            if self.ended:
                raise ValueError(f"{self.file} breaks off; expected a whole JSON file")

    def take(self, character: str) -> None:
        """Passes over a character that must be there."""
        if self.peek() != character:
            raise ValueError(
                f"{self.file} is not JSON as expected: {self.peek()!r} stands where {character!r} should"
            )
        self.at += 1

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.buffer, self.at)
                if end < len(self.buffer) or self.ended:  # a number at the edge may go on
                    self.at = end
                    return value
            except ValueError as error:
                if self.ended:
                    raise ValueError(f"{self.file} is not JSON, or breaks off: {error}") from None
            self._more()

    def elements(self) -> Iterator[Any]:
        """The elements of the list that comes next."""
        self.take("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() == ",":
                self.take(",")
        self.take("]")

"""The members of a tar file and where their bytes lie, also when some of it is damaged (POSIX ustar, pax, GNU).

Python's tarfile takes a damaged header in the middle for the end of the archive. Here the next sound header is
looked for, so that one bad block costs one member. Nothing is unpacked: names are names, and links are not followed.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
CHUNK = 2048 * BLOCK
LONG = 2**20
"""Bytes of a long name or of remarks about a member, at most."""
REGULAR = (b"0", b"\0", b"7")


class Member(NamedTuple):
    """A file in a tar, or what is wrong in its place."""

    name: str
    offset: int
    size: int
    damage: str = ""


def members(descriptor: int) -> Iterator[Member]:
    """Every file of an open tar, in order; what is damaged has no bytes and says so. OSError if it cannot be read."""
    at, end, special = 0, os.fstat(descriptor).st_size, {}
    while at < end:
        block = os.pread(descriptor, BLOCK, at)
        if not any(block):
            at = _find(descriptor, at, end, any)  # padding, or the end
            continue
        if not is_header(block):
            name = _text(block[:100]) if block[257:262] == b"ustar" else ""
            found = _find(descriptor, at + BLOCK, end, is_header)
            yield Member(name, at, 0, f"no sound header at byte {at}")
            at, special = found, {}
            continue
        kind, size = block[156:157], special.get("size", _number(block[124:136]))
        data = at + BLOCK
        at = data + -(-size // BLOCK) * BLOCK
        name = special.get("path") or _name(block)
        if data + size > end:
            yield Member(name, data, 0, "the tar breaks off within it")
        elif kind in (b"L", b"x") and size > LONG:
            yield Member(name, data, 0, f"{size} bytes of names")
        elif kind == b"L":
            special = special | {"path": _text(os.pread(descriptor, size, data))}
            continue
        elif kind == b"x":
            special = special | _pax(os.pread(descriptor, size, data))
            continue
        elif kind in REGULAR:
            yield Member(name, data, size)
        elif kind not in (b"5", b"g", b"K"):  # a folder, remarks for all, the target of a link
            yield Member(name, data, 0, "a link or a special file, not followed")
        special = special if kind in (b"g", b"K") else {}


def is_header(block: bytes) -> bool:
    """Whether 512 bytes bear their own checksum, and a size that can be read."""
    if len(block) < BLOCK:
        return False
    try:
        _number(block[124:136])
        wanted = int(block[148:156].split(b"\0")[0].strip() or b"-1", 8)
    except ValueError:
        return False
    return wanted == sum(block) - sum(block[148:156]) + 8 * 32


def _find(descriptor: int, at: int, end: int, good) -> int:
    """The first whole block from `at` on for which good(block); the end if there is none."""
    while at < end:
        chunk = os.pread(descriptor, CHUNK, at)
        if good is not any or any(chunk):
            for place in range(0, len(chunk), BLOCK):
                if good(chunk[place : place + BLOCK]):
                    return at + place
        if not chunk:
            break
        at += len(chunk)
    return end


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: binary, for more than 8 GiB
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:])
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _name(block: bytes) -> str:
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(block[:100])}" if prefix else _text(block[:100])


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict:
    """Path and size out of lines "LENGTH KEY=VALUE"."""
    found: dict = {}
    while data and b" " in data:
        length = data.split(b" ", 1)[0]
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            found["path"] = _text(value)
        elif key == b"size" and value.isdigit():
            found["size"] = int(value)
        data = data[int(length) :]
    return found

"""Damage to files: bytes, text, the values of JSON, the parts of containers."""

import io
import json
import os
import pickletools
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

VALUES = [None, True, -1, 0, 3, 10**7, 2**70, 1e308, float("nan"), "", "a", "../../x", "\0", "\ud800"]
VALUES += ["9" * 5000, "x" * 100_000, [], {}, [[0]], {"a": {}}]
WORDS = [b"-1", b"0", b"NaN", b"1e400", b"99999999999999999999", b"9" * 5000, b"null", b'"', b"\\u0000"]
WORDS += [b"[" * 100_000, b'{"a":' * 100_000, b"../../etc/passwd", b"\xff\xfe", b"\r", b"\0", b""]
WORDS += [b"x" * 10**6]
TEXT = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".yaml", ".token")
ATTACKS = [b"cos\nsystem\n(S'touch /ran'\ntR0", b"(S'touch /ran'\nios\nsystem\n0"]
ATTACKS += [b'cbuiltins\neval\n(S\'open("/ran", "w")\'\ntR0']
ATTACKS += [b"cbuiltins\nexec\n(S'import os; os.fork()'\ntR0"]
ATTACKS += [b"(cos\nsystem\nS'touch /ran'\no0", b"cbuiltins\n__import__\n(S'antigravity'\ntR0"]


def at_random(data: bytes, rng: Random, most: int = 2000) -> tuple[int, int]:
    """Start and end of a stretch; short ones are the most frequent."""
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + int(most ** rng.random()))


def flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 8)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def replace(data: bytes, rng: Random) -> bytes:
    """A stretch by zeros, ones, noise, or by another stretch; or removed, repeated, preceded by noise."""
    start, end = at_random(data, rng)
    other = slice(*at_random(data, rng))
    new = rng.choice((bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start), data[other]))
    kind = rng.randrange(5)
    return data[:start] + (b"", new + data[start:end], data[start:end] * 2, new, new)[kind] + data[end:]


def number(data: bytes, rng: Random) -> bytes:
    """An extreme number in place of 1, 2, 4 or 8 bytes."""
    start, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8))
    one = rng.choice((b"\xff", b"\x7f", b"\x80", b"\0"))
    value = one + (b"\xff" if one in b"\xff\x7f" else b"\0") * (size - 1)
    return data[:start] + rng.choice((value, value[::-1])) + data[start + size :]


def word(data: bytes, rng: Random) -> bytes:
    """One of WORDS in place of a number or a word, or between two bytes."""
    found = list(re.finditer(rb"-?\d[\d.e+-]*|\w+|\W", data)) or list(re.finditer(rb"$", data))
    start, end = rng.choice(found).span()
    return data[:start] + rng.choice(WORDS) + data[rng.choice((start, end)) :]


def line(data: bytes, rng: Random) -> bytes:
    """Lines removed, repeated, swapped."""
    lines = data.splitlines(keepends=True) or [b""]
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[one] = rng.choice((b"", lines[one] * 2, lines[other]))
    return b"".join(lines)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in JSON with each of its keys."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def json_value(data: bytes, rng: Random) -> bytes:
    """A value replaced, removed, renamed or swapped, in one line of JSON lines, or in the whole."""
    for part in (data, rng.choice(data.splitlines() or [b""])):
        try:
            tree = json.loads(part)
            container, key = rng.choice(list(_places(tree)))
            break
        except (ValueError, IndexError, TypeError, RecursionError):
            continue
    else:
        return word(data, rng)
    match rng.randrange(5):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[rng.choice(("", "../x", "a.b", "x" * 300))] = container.pop(key)
        case 2:
            other, its = rng.choice(list(_places(tree)))
            container[key] = json.loads(json.dumps(other[its]))
        case _:
            container[key] = rng.choice(VALUES)
    return data.replace(part, json.dumps(tree).encode(), 1)


def safetensors_header(data: bytes, rng: Random) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    header = json_value(data[8:end], rng)
    return len(header).to_bytes(8, "little") + header + data[end:]


def pickle_attack(data: bytes, rng: Random) -> bytes:
    """A call of code that leaves the stack as it is, between two instructions of a pickle."""
    start = rng.choice([found.start() for found in re.finditer(b"\x80\x02", data)] or [0])
    try:
        at = start + rng.choice([position for _, _, position in pickletools.genops(data[start:])][1:])
    except (ValueError, IndexError):
        return flip(data, rng)
    return data[:at] + rng.choice(ATTACKS) + data[at:]


def zip_member(data: bytes, rng: Random) -> bytes:
    """A member changed, renamed, twice or gone, with sound checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    ending = rng.choice((".pkl", ""))
    chosen = rng.choice([i for i, (name, _) in enumerate(members) if name.endswith(ending)])
    name, content = members[chosen]
    change = rng.choice((*BYTES, pickle_attack, pickle_attack))
    renamed = (rng.choice(("../x", "data.pkl", "a/data.pkl", name.upper())), content)
    members[chosen : chosen + 1] = rng.choice(
        ([], [(name, content)] * 2, [renamed], *[[(name, change(content, rng))]] * 5)
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new:
        for name, content in members:
            new.writestr(name, content)
    return buffer.getvalue()


BYTES = (flip, cut, replace, number)


def damage_bytes(data: bytes, name: str, rng: Random) -> tuple[bytes, str]:
    """Changed content, and how it was changed; a container may be changed inside."""
    changes: list[Callable[[bytes, Random], bytes]] = [*BYTES]
    suffix = os.path.splitext(name)[1]
    if suffix in TEXT:
        changes += [word, word, line]
    if suffix in (".json", ".jsonl"):
        changes += [json_value] * 5
    if suffix == ".safetensors":
        changes += [safetensors_header] * 4
    if data.startswith(b"PK\x03\x04"):
        changes = [*BYTES, *[zip_member] * 6]
    elif suffix in (".pt", ".pkl"):
        changes += [pickle_attack] * 2
    chosen = [rng.choice(changes) for _ in range(rng.choice((1, 1, 1, 2)))]
    if zip_member in chosen:
        chosen = [zip_member]
    for change in chosen:
        data = change(data, rng)
    return data, f"{' and '.join(change.__name__ for change in chosen)} in {name}"


def damage(path: Path, rng: Random) -> str:
    """Damages a file, or one of a folder; says how."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    suffix = rng.choice(sorted({file.suffix for file in files}))
    file = rng.choice([file for file in files if file.suffix == suffix])
    if path.is_file() or rng.random() < 0.8:
        data, how = damage_bytes(file.read_bytes(), file.name, rng)
        file.write_bytes(data)
        return how
    how = rng.choice(("removed", "emptied", "a folder", "a link to nothing", "swapped"))
    other = rng.choice(files)
    data = file.read_bytes()
    file.unlink()
    if how == "emptied":
        file.touch()
    elif how == "a folder":
        file.mkdir()
    elif how == "a link to nothing":
        file.symlink_to("nothing")
    elif how == "swapped" and file != other:
        shutil.move(other, file)
        other.write_bytes(data)
    return f"{file.name} {how}"

"""Normalizers and pre-tokenizers of a Hugging Face tokenizer.json, as functions on str.

Only what is held exactly is here; anything else is refused by its name. Regular expressions are written for
Oniguruma there and for the `regex` package here, whose syntax agrees for the patterns in use.
"""

import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

Normalize = Callable[[str], str]
Split = Callable[[list[str]], list[str]]
"""Pieces of a caption -> smaller pieces."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MARK = "\u2581"
PUNCTUATION = r"[\p{P}$+<=>^`|~]"


def compile_pattern(pattern: str) -> Any:
    r"""A compiled expression; \s is Unicode's White_Space, as in the original."""
    try:
        import regex
    except ImportError as error:
        raise ImportError("reading a Hugging Face tokenizer.json needs regex: pip install regex") from error
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"the pattern {pattern!r} of tokenizer.json cannot be held ({error})") from None


def _pattern(data: dict[str, str]) -> Any:
    """{"String": literal} or {"Regex": expression}."""
    (kind, text), *more = data.items()
    if more or kind not in ("String", "Regex"):
        raise ValueError(f"tokenizer.json has the pattern {data!r}, which is not held here")
    import regex  # compile_pattern says how to install it

    return compile_pattern(regex.escape(text) if kind == "String" else text)


def _refuse(what: str, data: dict[str, Any]) -> None:
    raise ValueError(f"tokenizer.json has the {what} {data.get('type')!r}, which this library does not hold")


# ---------------------------------------------------------------------------------------------
# Normalizers
# ---------------------------------------------------------------------------------------------


def normalizer(data: dict[str, Any] | None) -> Normalize:
    """str -> str."""
    match data:
        case None:
            return lambda text: text
        case {"type": "Sequence", "normalizers": [*parts]}:
            return _in_turn([normalizer(part) for part in parts])
        case {"type": "Lowercase"}:  # letter by letter: no final sigma
            return lambda text: "".join(letter.lower() for letter in text)
        case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" as form}:
            return lambda text: unicodedata.normalize(form, text)
        case {"type": "Replace", "pattern": pattern, "content": content}:
            found = _pattern(pattern)
            return lambda text: found.sub(lambda _: content, text)
        case {"type": "Prepend", "prepend": start}:
            return lambda text: start + text if text else text
        case {
            "type": "BertNormalizer",
            "clean_text": clean,
            "handle_chinese_chars": chinese,
            "lowercase": lower,
        }:
            accents = data.get("strip_accents")
            return _bert(clean, chinese, lower if accents is None else accents, lower)
        case _:
            _refuse("normalizer", data)


CONTROL = r"(?![\t\n\r])[\p{Cc}\p{Cf}\p{Co}]|\uFFFD"  # the original has the letters of Unicode 8
CHINESE = "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
CHINESE += (
    "\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"  # U+2B820 to 2B91F are left out there too
)


def _bert(clean: bool, chinese: bool, strip_accents: bool, lower: bool) -> Normalize:
    """Without control letters, any white space a space, spaces around Chinese letters, no accents,
    lowercase."""
    steps: list[Normalize] = []
    if clean:
        control, space = compile_pattern(CONTROL), compile_pattern(r"\s")
        steps.append(lambda text: space.sub(" ", control.sub("", text)))
    if chinese:
        letters = compile_pattern(CHINESE)
        steps.append(lambda text: letters.sub(lambda found: f" {found[0]} ", text))
    if strip_accents:
        marks = compile_pattern(r"\p{Mn}")
        steps.append(lambda text: marks.sub("", unicodedata.normalize("NFD", text)))
    if lower:
        steps.append(normalizer({"type": "Lowercase"}))
    return _in_turn(steps)


def _in_turn(functions: list[Callable]) -> Callable:
    def apply(value):
        for function in functions:
            value = function(value)
        return value

    return apply


# ---------------------------------------------------------------------------------------------
# Pre-tokenizers
# ---------------------------------------------------------------------------------------------


def splitter(data: dict[str, Any] | None) -> Split:
    """Pieces -> pieces."""
    match data:
        case None:
            return lambda pieces: pieces
        case {"type": "Sequence", "pretokenizers": [*parts]}:
            return _in_turn([splitter(part) for part in parts])
        case {"type": "Whitespace"}:
            return _each(_finder(r"[\w\u200c\u200d]+|[^\w\u200c\u200d\s]+"))
        case {"type": "WhitespaceSplit"}:
            return _each(_finder(r"\S+"))
        case {"type": "Digits"}:
            return _by_pattern(r"\p{N}" if data.get("individual_digits") else r"\p{N}+", "Isolated")
        case {"type": "Punctuation"}:
            return _by_pattern(PUNCTUATION, data.get("behavior", "Isolated"))
        case {"type": "BertPreTokenizer"}:
            return _in_turn([_each(_finder(r"\S+")), _by_pattern(PUNCTUATION, "Isolated")])
        case {"type": "Split", "pattern": pattern, "behavior": behavior}:
            found, invert = _pattern(pattern), data.get("invert", False)
            return _each(lambda text: _split(text, found, behavior, invert))
        case {"type": "ByteLevel"}:
            return _byte_level(data.get("add_prefix_space", True), data.get("use_regex", True))
        case {"type": "Metaspace"}:
            return _metaspace(data)
        case _:
            _refuse("pre-tokenizer", data)


def _each(split: Callable[[str], Iterator[str] | list[str]]) -> Split:
    return lambda pieces: [part for piece in pieces for part in split(piece) if part]


def _finder(pattern: str) -> Callable[[str], list[str]]:
    return compile_pattern(pattern).findall


def _by_pattern(pattern: str, behavior: str) -> Split:
    found = compile_pattern(pattern)
    return _each(lambda text: _split(text, found, behavior, False))


def _split(text: str, pattern: Any, behavior: str, invert: bool) -> list[str]:
    """Cuts a text at the matches of a pattern; `behavior` says where the matches themselves go."""
    parts = [(part, is_match != invert) for part, is_match in _matches(text, pattern)]
    match behavior:
        case "Removed":
            return [part for part, is_match in parts if not is_match]
        case "Isolated":
            return [part for part, _ in parts]
        case "Contiguous":
            return _joined(parts, lambda before, now: before == now)
        case "MergedWithPrevious":
            return _joined(parts, lambda before, now: now and not before)
        case "MergedWithNext":
            return _joined(parts, lambda before, now: before and not now)
        case _:
            raise ValueError(
                f"tokenizer.json has the split behavior {behavior!r}, which this library does not hold"
            )


def _matches(text: str, pattern: Any) -> Iterator[tuple[str, bool]]:
    """The matches and what stands between them, in order."""
    at = 0
    for found in pattern.finditer(text):
        if found.start() > at:
            yield text[at : found.start()], False
        if found.end() > found.start():
            yield found.group(), True
        at = found.end()
    if at < len(text):
        yield text[at:], False


def _joined(parts: list[tuple[str, bool]], belongs: Callable[[bool, bool], bool]) -> list[str]:
    """Joins a part to the one before where `belongs`(was that a match, is this a match)."""
    joined: list[str] = []
    before = None
    for part, is_match in parts:
        if before is not None and belongs(before, is_match):
            joined[-1] += part
        else:
            joined.append(part)
        before = is_match
    return joined


@lru_cache(1)
def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in own]
    return [chr(byte) if byte in own else chr(256 + others.index(byte)) for byte in range(256)]


def _byte_level(prefix: bool, use_regex: bool) -> Split:
    letters = byte_letters()
    words = _finder(GPT2) if use_regex else lambda text: [text]

    def split(text: str) -> list[str]:
        spaced = " " + text if prefix and not text.startswith(" ") else text
        return ["".join(letters[byte] for byte in word.encode()) for word in words(spaced)]

    return _each(split)


def _metaspace(data: dict[str, Any]) -> Split:
    mark = data.get("replacement", MARK)
    scheme = data.get("prepend_scheme", "always" if data.get("add_prefix_space", True) else "never")
    if scheme not in ("always", "never", "first"):
        raise ValueError(
            f"tokenizer.json has the prepend scheme {scheme!r}, which this library does not hold"
        )
    at_mark = compile_pattern(mark)

    def split(pieces: list[str]) -> list[str]:
        parts = []
        for i, piece in enumerate(pieces):
            marked = piece.replace(" ", mark)
            if not marked.startswith(mark) and (scheme == "always" or (scheme == "first" and i == 0)):
                marked = mark + marked
            parts += _split(marked, at_mark, "MergedWithNext", False) if data.get("split", True) else [marked]
        return [part for part in parts if part]

    return split

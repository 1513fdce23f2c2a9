"""Byte-pair encoding of captions with BPE-dropout (Section 2.2; Provilkov et al. 2020).

    "A red dog's bowl"  --normalize-->  a | red | dog | ' | s | bowl  --merges of each piece-->  ids

A caption is lowercased and split on everything outside a-z, as the paper's author describes in
https://github.com/openai/DALL-E/issues/22; merges never cross a split. Every piece begins with youtokentome's
word-start mark, so spaces need no token. The author does not merge spaces with words; here the mark merges
with the piece it starts, which saves one token a word.

Ids:

    0                unknown; used only without byte fallback
    1 .. 256         the bytes 0 .. 255, with byte fallback only
    next             the characters of the alphabet, the word-start mark among them
    then             one id per merge, in the order of priority

Start and pad tokens belong to the layout of the sequence, not to this vocabulary.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ftfy

from dalle.config import configuration
from dalle.io.text import check_text, parse_json
from dalle.text.bpe import UNKNOWN_TEXT, WORD_START, BPETokenizer
from dalle.text.external import huggingface, youtokentome

FORMAT, VERSION = "dalle-text-tokenizer", 1
UNKNOWN_ID, FIRST_BYTE_ID = 0, 1
MAX_PIECE = 64  # characters; encoding a piece takes quadratic time, so longer ones are split

# Runs of a-z, and runs of letters of other scripts. Digits, punctuation and symbols are a piece each.
PIECES = re.compile(rf"[a-z]{{1,{MAX_PIECE}}}|[^\W\d_a-z{WORD_START}]{{1,{MAX_PIECE}}}|[^\s{WORD_START}]")

# Spaces that decode removes. No rule joins two words, so that the result encodes to the same ids.
SPACING = (
    (re.compile(r"(?<=\d) (?=\d)"), ""),  # 1 2 -> 12
    (re.compile(r" (?=[,.;:!?%)\]}])"), ""),  # dog , -> dog,
    (re.compile(r"(?<=[(\[{#$]) "), ""),  # ( dog -> (dog
    (re.compile(r"(?<=\d[.:]) (?=\d)"), ""),  # 3. 5 -> 3.5
    (re.compile(r"(?<=[a-z]) ([-/]) (?=[a-z])"), r"\1"),  # black - white -> black-white
    (re.compile(r"(?<=[a-z]) ' (?=(?:s|t|re|ve|ll|d|m)\b)"), "'"),  # dog ' s -> dog's
)


@configuration
class TextTokenizerConfig:
    """Vocabulary of the text tokenizer; where the paper is silent the defaults are ours."""

    vocab_size: int = 16384
    """Maximum number of ids: unknown, bytes, characters and merges together (2.2)."""
    byte_fallback: bool = True
    """Encode a character outside the alphabet as its UTF-8 bytes instead of unknown."""
    character_coverage: float = 0.9999
    """Share of the training text that the alphabet covers; rarer characters leave their ids to merges."""

    def __post_init__(self):
        if self.vocab_size < (least := 258 if self.byte_fallback else 2):
            needs = f"at least {least} ids for unknown, bytes and the word-start mark"
            raise ValueError(f"vocab_size {self.vocab_size} is too small: it needs {needs}")
        if not 0 < self.character_coverage <= 1:
            raise ValueError(f"character_coverage must be in (0, 1], got {self.character_coverage!r}")


def normalize(caption: str) -> list[str]:
    """Pieces of a caption: Unicode repaired by ftfy, lowercased, split on everything outside a-z."""
    check_text(caption)
    return PIECES.findall(ftfy.fix_text(caption).lower())


class TextTokenizer(BPETokenizer):
    """A trained vocabulary: an alphabet and merges in order of priority.

    Args:
        config: what the vocabulary was trained with.
        characters: the alphabet in the order of ids, the word-start mark included.
        merges: the two ids that each merge joins, in the order of ids.
    """

    def __init__(self, config: TextTokenizerConfig, characters: str, merges: Sequence[tuple[int, int]]):
        self.config = config
        self.characters = characters
        self.merges = [(left, right) for left, right in merges]
        first = FIRST_BYTE_ID + (256 if config.byte_fallback else 0)
        first_merge = first + len(characters)
        self.vocab_size = first_merge + len(self.merges)
        self._character_ids = {character: first + i for i, character in enumerate(characters)}
        super().__init__({pair: (i, i) for i, pair in enumerate(self.merges, start=first_merge)})
        if WORD_START not in self._character_ids or len(self._character_ids) != len(characters):
            raise ValueError("the alphabet must hold every character once, the word-start mark included")
        for i, pair in enumerate(self.merges):
            if not all(first <= part < first_merge + i for part in pair):
                raise ValueError(f"merge {i} joins {pair}, which are not ids of characters or earlier merges")
        if self.vocab_size > config.vocab_size:
            raise ValueError(f"{self.vocab_size} ids are more than the vocab_size of {config.vocab_size}")
        self._token_bytes = [UNKNOWN_TEXT.encode()]
        if config.byte_fallback:
            self._token_bytes += [bytes([byte]) for byte in range(256)]
        self._token_bytes += [character.encode() for character in characters]
        for left, right in self.merges:
            self._token_bytes.append(self._token_bytes[left] + self._token_bytes[right])

    pieces = staticmethod(normalize)

    def symbols(self, piece: str) -> list[int]:
        """The word-start mark, then characters, bytes or unknowns."""
        symbols = [self._character_ids[WORD_START]]
        for character in piece:
            if character in self._character_ids:
                symbols.append(self._character_ids[character])
            elif self.config.byte_fallback:
                symbols += [FIRST_BYTE_ID + byte for byte in character.encode()]
            elif symbols[-1] != UNKNOWN_ID:  # like youtokentome, one unknown for a run of them
                symbols.append(UNKNOWN_ID)
        return symbols

    def out_of_vocabulary(self, caption: str) -> list[str]:
        """Pieces of a caption with characters outside the alphabet, which become bytes or unknown."""
        return [piece for piece in normalize(caption) if not self._character_ids.keys() >= set(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """A readable caption in lower case, which encodes to the same ids if they had no dropout.

        Pieces are separated by spaces except where SPACING removes them: the spaces of the original are not
        encoded. Bytes that are not UTF-8 become U+FFFD.
        """
        encoded = b"".join(self._token_bytes[self.check_token(at, token)] for at, token in enumerate(ids))
        text = " ".join(encoded.decode("utf-8", errors="replace").replace(WORD_START, " ").split())
        for pattern, replacement in SPACING:
            text = pattern.sub(replacement, text)
        return text

    def to_dict(self) -> dict[str, Any]:
        """All of the tokenizer as JSON types."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "config": asdict(self.config),
            "characters": self.characters,
            "merges": [list(pair) for pair in self.merges],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TextTokenizer":
        """The inverse of to_dict; ValueError for other data."""
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"expected the format {FORMAT!r} in version {VERSION}")
        try:
            return cls(TextTokenizerConfig(**data["config"]), data["characters"], data["merges"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the text tokenizer is incomplete or damaged ({error!r})") from error


def load_text_tokenizer(path: Path | str) -> BPETokenizer:
    """Reads text_tokenizer.json of this library, a Hugging Face tokenizer.json, or a youtokentome model.

    Raises:
        ValueError: another file, or a damaged or unsupported one.
    """
    expected = (
        "expected text_tokenizer.json of scripts/train_tokenizer.py, a Hugging Face tokenizer.json of BPE "
        "kind, or a youtokentome model"
    )
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}); {expected}") from error
    try:
        if content[:1].isdigit():
            return youtokentome.YoutokentomeTokenizer(youtokentome.parse_model(content.decode()))
        data = parse_json(content, "it")
        if isinstance(data, dict) and "model" in data and "format" not in data:
            return huggingface.HuggingFaceTokenizer(data)
        return text_tokenizer_from_dict(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else f"it is damaged ({error!r})"
        raise ValueError(f"{path} is not a text tokenizer: {reason!s:.300}; {expected}") from error


def text_tokenizer_from_dict(data: dict[str, Any]) -> BPETokenizer:
    """The inverse of `BPETokenizer.to_dict`, whatever its class."""
    name = data.get("format") if isinstance(data, dict) else None
    external = {
        huggingface.FORMAT: huggingface.HuggingFaceTokenizer,
        youtokentome.FORMAT: youtokentome.YoutokentomeTokenizer,
    }
    return external.get(name, TextTokenizer).from_dict(data)

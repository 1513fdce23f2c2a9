"""Byte-pair encoding of captions with BPE-dropout (section 2.2; Provilkov et al. 2020).

The way of a caption:

    "A red dog's bowl"  --normalize-->  a | red | dog | ' | s | bowl  --merges of each piece-->  ids

A caption is lowercased and split on everything outside a-z, as the paper's author describes in
https://github.com/openai/DALL-E/issues/22; merges never cross a split. Every piece begins with the word-start
mark of youtokentome, whose merges these are, so ids need no token for a space. The author does not merge
spaces with words; here the mark merges with the piece it starts, or every word would cost one more token.

Ids:

    0                unknown; used only without byte fallback
    1 .. 256         the bytes 0 .. 255, with byte fallback only
    next             the characters of the alphabet, the word-start mark among them
    then             one id per merge, in the order of priority

Start and pad tokens belong to the layout of the sequence, not to this vocabulary.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ftfy

from dalle.text.bpe import BPETokenizer
from dalle.text.config import FIRST_BYTE_ID, TextTokenizerConfig

FORMAT, VERSION = "dalle-text-tokenizer", 1
UNKNOWN_ID = 0
WORD_START = "\u2581"
UNKNOWN_TEXT = "\ufffd"
MAX_PIECE = 64  # characters; encoding a piece is quadratic in its length, so an endless word is cut

# Runs of a-z are words. Runs of other letters stay together too, or a caption in another script would be
# spelt letter by letter. Digits, punctuation and symbols are a piece each.
PIECES = re.compile(rf"[a-z]{{1,{MAX_PIECE}}}|[^\W\d_a-z{WORD_START}]{{1,{MAX_PIECE}}}|[^\s{WORD_START}]")

# What decode does to the spaces between pieces. No rule joins two words, so that encoding the result again
# gives the same ids.
SPACING = (
    (re.compile(r"(?<=\d) (?=\d)"), ""),  # 1 2 -> 12
    (re.compile(r" (?=[,.;:!?%)\]}])"), ""),  # dog , -> dog,
    (re.compile(r"(?<=[(\[{#$]) "), ""),  # ( dog -> (dog
    (re.compile(r"(?<=\d[.:]) (?=\d)"), ""),  # 3. 5 -> 3.5
    (re.compile(r"(?<=[a-z]) ([-/]) (?=[a-z])"), r"\1"),  # black - white -> black-white
    (re.compile(r"(?<=[a-z]) ' (?=(?:s|t|re|ve|ll|d|m)\b)"), "'"),  # dog ' s -> dog's
)


def normalize(caption: str) -> list[str]:
    """The pieces of a caption: mended Unicode, lowercase, split on everything outside a-z."""
    if not isinstance(caption, str):
        raise TypeError(f"a caption must be a str, not {type(caption).__name__}: {caption!r:.80}")
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
        first = config.first_character_id
        self._character_ids = {character: first + i for i, character in enumerate(characters)}
        ids = range(first + len(characters), first + len(characters) + len(self.merges))
        super().__init__({pair: (i, i) for i, pair in zip(ids, self.merges, strict=True)})
        self._check_vocabulary()
        self._token_bytes = self._spell_out_tokens()

    def __len__(self) -> int:
        return self.config.first_character_id + len(self.characters) + len(self.merges)

    @property
    def vocab_size(self) -> int:
        """The number of ids there are; fewer than config.vocab_size if the captions gave too few merges."""
        return len(self)

    def _check_vocabulary(self) -> None:
        if WORD_START not in self._character_ids or len(self._character_ids) != len(self.characters):
            raise ValueError("the alphabet must hold every character once, the word-start mark included")
        first = self.config.first_character_id
        for i, pair in enumerate(self.merges):
            if not all(first <= part < first + len(self.characters) + i for part in pair):
                raise ValueError(
                    f"merge {i} joins the ids {pair}, which are not characters or earlier merges"
                )
        if len(self) > self.config.vocab_size:
            raise ValueError(f"{len(self)} ids are more than the vocab_size of {self.config.vocab_size}")

    def _spell_out_tokens(self) -> list[bytes]:
        tokens = [UNKNOWN_TEXT.encode()]
        tokens += [bytes([byte]) for byte in range(256)] if self.config.byte_fallback else []
        tokens += [character.encode() for character in self.characters]
        for left, right in self.merges:
            tokens.append(tokens[left] + tokens[right])
        return tokens

    def pieces(self, caption: str) -> list[str]:
        """Runs of letters, and whatever else one by one: see `normalize`."""
        return normalize(caption)

    def symbols(self, piece: str) -> list[int]:
        """A piece before merging: the word-start mark, then its characters, bytes or unknowns."""
        symbols = [self._character_ids[WORD_START]]
        for character in piece:
            if character in self._character_ids:
                symbols.append(self._character_ids[character])
            elif self.config.byte_fallback:
                symbols += [FIRST_BYTE_ID + byte for byte in character.encode()]
            elif symbols[-1] != UNKNOWN_ID:  # like youtokentome, one unknown for a run of them
                symbols.append(UNKNOWN_ID)
        return symbols

    def decode(self, ids: Iterable[int]) -> str:
        """A readable caption in lower case; encoding it again gives the same ids if they had no dropout.

        Spaces are put between pieces except where SPACING takes them out again, for where the original had
        spaces is not encoded. Bytes that are not UTF-8 become U+FFFD.
        """
        spelling = b"".join(self._token_bytes[self.check_token(at, token)] for at, token in enumerate(ids))
        text = " ".join(spelling.decode("utf-8", errors="replace").replace(WORD_START, " ").split())
        for pattern, replacement in SPACING:
            text = pattern.sub(replacement, text)
        return text

    def to_dict(self) -> dict[str, Any]:
        """All there is to it, in types that JSON knows, as a checkpoint holds it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "config": asdict(self.config),
            "characters": self.characters,
            "merges": [list(pair) for pair in self.merges],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TextTokenizer":
        """The inverse of to_dict; ValueError if data is anything else."""
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(
                f"expected the format {FORMAT!r} in version {VERSION}, as TextTokenizer.save writes it"
            )
        try:
            return cls(TextTokenizerConfig(**data["config"]), data["characters"], data["merges"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the text tokenizer is incomplete or damaged ({error!r})") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TextTokenizer":
        """Read what save wrote; ValueError naming the file if it is something else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_bytes()))
        except OSError as error:
            raise ValueError(
                f"cannot read {os.fspath(path)} ({error.strerror}); expected a JSON file that "
                "TextTokenizer.save wrote"
            ) from error
        except ValueError as error:  # also what json and a wrong encoding raise
            raise ValueError(
                f"{os.fspath(path)} is not a text tokenizer: {error}. Give a JSON file that "
                "TextTokenizer.save wrote, or train one with scripts/train_tokenizer.py"
            ) from error

"""Models of youtokentome as they are: their own ids, their own splitting, nothing lowercased or mended.

The file is plain text: "n_characters n_merges", lines "codepoint id", lines "left right merged", and the ids
of unknown, pad, begin and end (-1 for one that there is not). Words are what stands between spaces, each
behind the word-start mark; a run of characters outside the alphabet is one unknown. Reading needs no
youtokentome.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dalle.text.bpe import BPETokenizer
from dalle.text.tokenizer import UNKNOWN_TEXT, WORD_START

FORMAT, VERSION = "youtokentome", 1
WORDS = re.compile(rf"[^ \t\n\v\f\r{WORD_START}]+")  # C's isspace, and the mark itself


def parse_model(text: str) -> dict[str, Any]:
    """A model file as plain data: characters {id: character}, merges [left, right, merged], special ids.

    Raises:
        ValueError: not a model file, or one that breaks off.
    """
    try:
        head, *lines = [[int(number) for number in line.split()] for line in text.splitlines()]
        n_characters, n_merges = head
        characters = [[token, chr(codepoint)] for codepoint, token in lines[:n_characters]]
        merges = [
            [left, right, merged] for left, right, merged in lines[n_characters : n_characters + n_merges]
        ]
        (special,) = lines[n_characters + n_merges :]
        unknown, pad, begin, end = special
    except (ValueError, OverflowError) as error:
        raise ValueError(f"expected the text of a youtokentome model ({error})") from None
    if len(characters) != n_characters or len(merges) != n_merges:
        raise ValueError("the youtokentome model breaks off")
    special_ids = {"unknown": unknown, "pad": pad, "begin": begin, "end": end}
    return {"characters": sorted(characters), "merges": merges, "special": special_ids}


class YoutokentomeTokenizer(BPETokenizer):
    """Encodes as `youtokentome.BPE(path).encode` does without begin and end, which belong to the layout.

    Args:
        model: what `parse_model` gives.
    """

    def __init__(self, model: dict[str, Any]):
        self.model = model
        self._characters = {character: token for token, character in model["characters"]}
        self._unknown = model["special"]["unknown"]
        merges = {(left, right): (rank, merged) for rank, (left, right, merged) in enumerate(model["merges"])}
        super().__init__(merges)
        self._spelling = self._spell_out()
        self.vocab_size = max(self._spelling) + 1

    @classmethod
    def load(cls, path: Path | str) -> "YoutokentomeTokenizer":
        """A model file that youtokentome wrote."""
        return cls(parse_model(Path(path).read_text(encoding="utf-8")))

    def _spell_out(self) -> dict[int, str]:
        if WORD_START not in self._characters:
            raise ValueError("the youtokentome model lacks the word-start mark; it is damaged")
        spelling = {token: "" for token in self.model["special"].values() if token >= 0}
        spelling[self._unknown] = UNKNOWN_TEXT
        spelling |= {token: character for character, token in self._characters.items()}
        for left, right, merged in self.model["merges"]:
            if left not in spelling or right not in spelling:
                raise ValueError(f"the youtokentome model joins {left} and {right}, which are no earlier ids")
            spelling[merged] = spelling[left] + spelling[right]
        return spelling

    def pieces(self, caption: str) -> list[str]:
        """Words between spaces."""
        return WORDS.findall(caption)

    def symbols(self, piece: str) -> list[int]:
        """The word-start mark and the characters; one unknown for a run of others."""
        symbols = [self._characters[WORD_START]]
        for character in piece:
            token = self._characters.get(character, self._unknown)
            if token != self._unknown or symbols[-1] != self._unknown:
                symbols.append(token)
        return symbols

    def decode(self, ids: Iterable[int]) -> str:
        """The words, with a space between; pad, begin and end are nothing."""
        text = "".join(self._spelling.get(self.check_token(at, token), "") for at, token in enumerate(ids))
        return text.replace(WORD_START, " ").removeprefix(" ")

    def to_dict(self) -> dict[str, Any]:
        """The model as plain data."""
        return {"format": FORMAT, "version": VERSION, **self.model}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "YoutokentomeTokenizer":
        """The inverse of to_dict; ValueError if data is anything else."""
        if (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"expected the format {FORMAT!r} in version {VERSION}")
        try:
            return cls({name: data[name] for name in ("characters", "merges", "special")})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the youtokentome model is incomplete or damaged ({error!r})") from error

"""Model files of youtokentome, read without the package: their own ids and splitting, nothing lowercased.

The file is plain text: "n_characters n_merges", lines "codepoint id", lines "left right merged", and the ids
of unknown, pad, begin and end (-1 for none). Words are what is between spaces, each after the word-start
mark; a run of characters outside the alphabet is one unknown.
"""

import re
from collections.abc import Iterable
from typing import Any

from dalle.text.bpe import UNKNOWN_TEXT, WORD_START, BPETokenizer

FORMAT, VERSION = "youtokentome", 1
WORDS = re.compile(rf"[^ \t\n\v\f\r{WORD_START}]+")  # C's isspace, and the mark itself


def parse_model(text: str) -> dict[str, Any]:
    """A model file as plain data: characters [id, character], merges [left, right, merged], special ids.

    Raises:
        ValueError: not a model file, or a truncated one.
    """
    try:
        head, *lines = [list(map(int, line.split())) for line in re.split(r"[\r\n]+", text.strip())]
        n_characters, n_merges = head
        characters = [[token, chr(codepoint)] for codepoint, token in lines[:n_characters]]
        merges = [[left, right, to] for left, right, to in lines[n_characters : n_characters + n_merges]]
        (special,) = lines[n_characters + n_merges :]
        unknown, pad, begin, end = special
    except (ValueError, OverflowError) as error:
        raise ValueError(f"expected the text of a youtokentome model ({error})") from None
    special_ids = {"unknown": unknown, "pad": pad, "begin": begin, "end": end}
    return {"characters": sorted(characters), "merges": merges, "special": special_ids}


class YoutokentomeTokenizer(BPETokenizer):
    """Encodes as `youtokentome.BPE(path).encode` without begin and end, which belong to the layout.

    Args:
        model: what `parse_model` returns; with lowercase=True, captions are lowercased and stripped
            (ruDALL-E).
    """

    def __init__(self, model: dict[str, Any]):
        self.model = model
        self._characters = {character: token for token, character in model["characters"]}
        self.unknown_id = model["special"]["unknown"]
        super().__init__(
            {(left, right): (rank, to) for rank, (left, right, to) in enumerate(model["merges"])}
        )
        if WORD_START not in self._characters:
            raise ValueError("the youtokentome model lacks the word-start mark; it is damaged")
        self._texts = {token: "" for token in model["special"].values() if token >= 0}
        self._texts[self.unknown_id] = UNKNOWN_TEXT
        self._texts |= {token: character for character, token in self._characters.items()}
        for left, right, merged in model["merges"]:
            if left not in self._texts or right not in self._texts:
                raise ValueError(f"the youtokentome model joins {left} and {right}, which are no earlier ids")
            self._texts[merged] = self._texts[left] + self._texts[right]
        self.vocab_size = max(self._texts) + 1

    def pieces(self, caption: str) -> list[str]:
        """Words between spaces."""
        return WORDS.findall(caption.lower().strip() if self.model.get("lowercase") else caption)

    def symbols(self, piece: str) -> list[int]:
        """The word-start mark and the characters; one unknown for a run of unknown ones."""
        symbols = [self._characters[WORD_START]]
        for character in piece:
            token = self._characters.get(character, self.unknown_id)
            if token != self.unknown_id or symbols[-1] != self.unknown_id:
                symbols.append(token)
        return symbols

    def decode(self, ids: Iterable[int]) -> str:
        """The words with spaces between; pad, begin and end are empty."""
        text = "".join(self._texts.get(self.check_token(at, token), "") for at, token in enumerate(ids))
        return text.replace(WORD_START, " ").removeprefix(" ")

    def to_dict(self) -> dict[str, Any]:
        """The model as plain data."""
        return {"format": FORMAT, "version": VERSION, **self.model}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "YoutokentomeTokenizer":
        """The inverse of to_dict; ValueError for other data."""
        if (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"expected the format {FORMAT!r} in version {VERSION}")
        try:
            return cls({name: value for name, value in data.items() if name not in ("format", "version")})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the youtokentome model is incomplete or damaged ({error!r})") from error

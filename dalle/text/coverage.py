"""How well a vocabulary fits captions: what share it covers, how long they become, how many would be cut."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from dalle.text.bpe import BPETokenizer
from dalle.text.tokenizer import UNKNOWN_ID, UNKNOWN_TEXT, TextTokenizer


def out_of_vocabulary(text: BPETokenizer, caption: str) -> list[str]:
    """Pieces of a caption with letters that the vocabulary lacks: they become bytes, or unknown."""
    if isinstance(text, TextTokenizer):
        alphabet = set(text.characters)
        return [piece for piece in text.pieces(caption) if not alphabet.issuperset(piece)]
    return [piece for piece in text.pieces(caption) if UNKNOWN_TEXT in text.decode(text.symbols(piece))]


def vocabulary_coverage(text: TextTokenizer, captions: Iterable[str], room: int) -> dict[str, Any]:
    """Measures a vocabulary on captions, which are read once and not kept.

    Args:
        text: the vocabulary.
        captions: any number.
        room: tokens that a caption may have before it is cut.

    Returns:
        captions: how many; coverage: share of their characters in the alphabet, the others being spelt in
            bytes or
        unknown; tokens_per_caption: mean, median, 95 of 100, most; truncated: share of captions longer than
        room.
    """
    lengths: list[int] = []
    characters = spelt = 0
    alphabet = set(text.characters)
    for caption in captions:
        lengths.append(len(text.encode(caption)))
        letters = "".join(text.pieces(caption))
        characters += len(letters)
        spelt += sum(letter not in alphabet for letter in letters)
    counts = np.array(lengths or [0])
    return {
        "captions": len(lengths),
        "coverage": round(1 - spelt / max(1, characters), 6),
        "outside_the_alphabet": "bytes" if text.config.byte_fallback else f"unknown (id {UNKNOWN_ID})",
        "tokens_per_caption": {
            "mean": round(float(counts.mean()), 2),
            "median": int(np.percentile(counts, 50, method="higher")),
            "95_of_100": int(np.percentile(counts, 95, method="higher")),
            "most": int(counts.max()),
        },
        "room": room,
        "truncated": round(float((counts > room).mean()), 6),
        "vocab_size": text.vocab_size,
    }

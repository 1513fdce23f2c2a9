"""Vocabulary coverage: the characters that a text tokenizer knows, and how many tokens captions take."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from dalle.text.tokenizer import UNKNOWN_ID, TextTokenizer


def vocabulary_coverage(text: TextTokenizer, captions: Iterable[str], max_caption_len: int) -> dict[str, Any]:
    """Statistics of captions, which are read once and not kept.

    Args:
        text: the tokenizer.
        captions: any number.
        max_caption_len: tokens of a caption before it is truncated.

    Returns:
        captions: how many; coverage: share of their characters in the alphabet; tokens_per_caption:
        statistics; truncated: share of captions longer than max_caption_len.
    """
    lengths: list[int] = []
    characters = outside = 0
    alphabet = set(text.characters)
    for caption in captions:
        lengths.append(len(text.encode(caption)))
        letters = "".join(text.pieces(caption))
        characters += len(letters)
        outside += sum(letter not in alphabet for letter in letters)
    counts = np.array(lengths or [0])
    return {
        "captions": len(lengths),
        "coverage": round(1 - outside / max(1, characters), 6),
        "outside_the_alphabet": "bytes" if text.config.byte_fallback else f"unknown (id {UNKNOWN_ID})",
        "tokens_per_caption": {
            "mean": round(float(counts.mean()), 2),
            "median": int(np.percentile(counts, 50, method="higher")),
            "95_of_100": int(np.percentile(counts, 95, method="higher")),
            "most": int(counts.max()),
        },
        "max_caption_len": max_caption_len,
        "truncated": round(float((counts > max_caption_len).mean()), 6),
        "vocab_size": text.vocab_size,
    }

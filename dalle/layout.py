"""The token sequence: text_len text positions, then rows x columns image positions (2.2, Figure 10).

The only place with sequence arithmetic. The joint vocabulary holds

    [0, text_vocab)                    text ids
    text_vocab + p                     the pad of text position p: each has its own (2.2)
    text_vocab + text_len + [0, image_vocab)   image ids

and, as inputs only, start-of-text and start-of-image behind it. Inputs are shifted right, so position p
reads id p - 1 and predicts id p; position 0 reads start-of-text and the first image position reads
start-of-image. The last text id is therefore never read, and a caption has room for text_len - 1
tokens: start-of-text counts among the 256, as Figure 10 draws it.

    B batch, T text_len, N = T + rows * columns, V joint vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Lengths, offsets and rules of the sequence; the defaults are the paper's.

    Args:
        text_len: text positions, start-of-text among them.
        grid: image positions as (rows, columns), or one number for a square.
        text_vocab: text ids without pads.
        image_vocab: codes of the image tokenizer.
    """

    text_len: int = 256
    grid: int | tuple[int, int] = 32
    text_vocab: int = 16384
    image_vocab: int = 8192
    rows: int = field(init=False)
    """Rows of image tokens."""
    columns: int = field(init=False)
    """Columns of image tokens."""
    num_image_tokens: int = field(init=False)
    """Image positions."""
    seq_len: int = field(init=False)
    """N, all positions."""
    max_caption_len: int = field(init=False)
    """Most tokens of a caption."""
    image_offset: int = field(init=False)
    """Joint id of image code 0."""
    vocab: int = field(init=False)
    """V, what the model predicts over."""
    start_of_text: int = field(init=False)
    """Input id of position 0."""
    start_of_image: int = field(init=False)
    """Input id of the first image position."""
    embedding_size: int = field(init=False)
    """What the model reads: the joint vocabulary and the two starts."""

    def __post_init__(self):
        grid = (self.grid, self.grid) if isinstance(self.grid, int) else self.grid
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid must be (rows, columns), both positive, got {grid}")
        if self.text_len < 2:
            raise ValueError(f"text_len must be at least 2 (start-of-text and a token), got {self.text_len}")
        if min(self.text_vocab, self.image_vocab) < 1:
            raise ValueError(f"vocabularies must be positive, got {self.text_vocab} and {self.image_vocab}")
        rows, columns = grid
        image_offset = self.text_vocab + self.text_len
        vocab = image_offset + self.image_vocab
        derived = {
            "grid": grid,
            "rows": rows,
            "columns": columns,
            "num_image_tokens": rows * columns,
            "seq_len": self.text_len + rows * columns,
            "max_caption_len": self.text_len - 1,
            "image_offset": image_offset,
            "vocab": vocab,
            "start_of_text": vocab,
            "start_of_image": vocab + 1,
            "embedding_size": vocab + 2,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def pad_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """Text ids of captions -> text_tokens int64 (B, T), filled up with each position's pad.

        Raises:
            ValueError: an id outside the vocabulary, or more than `max_caption_len` ids without `truncate`.
        """
        import torch

        tokens = self.text_vocab + torch.arange(self.text_len).repeat(len(captions), 1)
        for row, ids in enumerate(captions):
            if len(ids) > self.max_caption_len and not truncate:
                which = f"caption {row}" if len(captions) > 1 else "the caption"
                raise ValueError(
                    f"{which} has {len(ids)} tokens, at most {self.max_caption_len} fit; shorten it"
                )
            kept = torch.tensor(list(ids[: self.max_caption_len]), dtype=torch.int64)
            check_tokens(kept[None], self.text_vocab, "text ids")
            tokens[row, : len(kept)] = kept
        return tokens

    def pack(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """text_tokens (B, T) and image_tokens (B, n) -> joint ids (B, T + n); n may stop short."""
        import torch

        if text_tokens.shape[1] != self.text_len or image_tokens.shape[1] > self.num_image_tokens:
            raise ValueError(
                f"expected ({self.text_len}) text tokens and at most {self.num_image_tokens} "
                f"({self.rows} x {self.columns}) image tokens, got {text_tokens.shape[1]} and "
                f"{image_tokens.shape[1]}; is it another grid?"
            )
        check_tokens(text_tokens, self.image_offset, "text_tokens")
        check_tokens(image_tokens, self.image_vocab, "image_tokens")
        return torch.cat([text_tokens, image_tokens + self.image_offset], dim=1)

    def unpack(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Joint ids (B, T + n) -> text_tokens (B, T), image_tokens (B, n)."""
        return ids[:, : self.text_len], ids[:, self.text_len :] - self.image_offset

    def shift(self, ids: Tensor) -> Tensor:
        """What each position reads: joint ids (B, n) -> input ids (B, min(n + 1, N))."""
        import torch

        start = ids.new_full((len(ids), 1), self.start_of_text)
        inputs = torch.cat([start, ids], dim=1)[:, : self.seq_len]
        inputs[:, self.text_len : self.text_len + 1] = self.start_of_image
        return inputs

    def loss_mask(self, ids: Tensor) -> Tensor:
        """Which targets count: bool (B, n).

        Every image token; every caption token and the first pad, which says that the caption ends.
        Later pads follow from the first and are left out (the paper is silent).
        """
        import torch

        text, image = self.unpack(ids)
        is_pad = text >= self.text_vocab
        first_pad = is_pad & (is_pad.cumsum(dim=1) == 1)
        return torch.cat([~is_pad | first_pad, torch.ones_like(image, dtype=torch.bool)], dim=1)


def token_grid(tokens: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, columns) of image tokens (B, N): those given, else a square; ValueError unless they fit."""
    side = math.isqrt(tokens.shape[1])
    rows, columns = grid or (side, side)
    if rows * columns != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a grid of {rows} x {columns}; give grid")
    return rows, columns


def check_tokens(tokens: Tensor, vocab_size: int, name: str = "tokens") -> None:
    """ValueError, naming position and value, unless tokens are int64 (B, N) in [0, vocab_size)."""
    if str(getattr(tokens, "dtype", "")) != "torch.int64" or tokens.ndim != 2:
        found = f"{tokens.dtype} {tuple(tokens.shape)}" if hasattr(tokens, "dtype") else f"{tokens!r:.80}"
        raise ValueError(f"{name} must be int64 (B, N), got {found}")
    bad = (tokens < 0) | (tokens >= vocab_size)
    if bad.any():
        row, position = bad.nonzero()[0].tolist()
        value = int(tokens[row, position])
        raise ValueError(
            f"{name} must be in [0, {vocab_size}), got {value} at row {row}, position {position}"
        )

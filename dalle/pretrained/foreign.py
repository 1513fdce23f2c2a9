"""What transformers of other programs share here: a stream without start-of-image, and caches under their own masks.

They read the last text id in the slot that draws the first image token, where ours reads start-of-image. So the
mask of one of them counts T + 1 text slots (its start and T ids), then the image tokens, each read one slot later
than it is drawn.

    B batch, T text_len, N image tokens, W columns of the grid
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.layout import TokenLayout
from dalle.nn.cache import Places


@dataclass(frozen=True)
class ForeignLayout(TokenLayout):
    """The stream of text ids and image tokens behind one start, whose input id is `start`.

    Args:
        start: input id of slot 0.
        zero_is_pad: text id 0 stands for the pad of its position.
    """

    start: int = 0
    zero_is_pad: bool = False

    @property
    def caption_room(self) -> int:
        """Most tokens of a caption: all text slots."""
        return self.text_len

    @property
    def start_of_text(self) -> int:
        """Input id of slot 0."""
        return self.start

    def pad_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """See `TokenLayout.pad_text`."""
        tokens = super().pad_text(captions, truncate)
        if self.zero_is_pad:
            tokens = torch.where(tokens == 0, self.text_vocab + torch.arange(self.text_len), tokens)
        return tokens

    def shift(self, ids: Tensor) -> Tensor:
        """What each slot reads: joint ids (B, n) -> input ids (B, min(n + 1, T + N)); nothing marks the image."""
        return torch.cat([ids.new_full((len(ids), 1), self.start), ids], dim=1)[:, : self.length]

    @property
    def text_slots(self) -> int:
        """Slots that read no image token: the start's and T more."""
        return self.text_len + 1


class ForeignPlaces(Places):
    """Every image token's place in order; which of them each sees is a table.

    Args:
        sees: bool (N, N).
    """

    def __init__(self, sees: Tensor):
        slots = len(sees)
        self.groups, self.size, self.sees = 1, slots, sees
        self.group, self.own = torch.zeros(slots, dtype=torch.int64), torch.arange(slots)
        self.bias = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)
        self.reads = list(range(1, slots + 1))
        self.hides = [not bool(row[:count].all()) for row, count in zip(sees, self.reads, strict=True)]
        self.to(torch.device("cpu"))


def stream_mask(image_sees: Tensor, text_slots: int) -> Tensor:
    """bool (text_slots + N, text_slots + N): causal, all text seen by the image, image by image as (N, N) says."""
    length = text_slots + len(image_sees)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[text_slots:, text_slots:] &= image_sees
    return mask

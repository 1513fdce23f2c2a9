"""What transformers of other programs share here: a stream without start-of-image, and caches under their own masks.

They read the last text id in the slot that draws the first image token, where ours reads start-of-image. So the
stream of one of them has T + 1 text slots (its start and T ids), or T where it has no start, then the image tokens,
each read one slot later than it is drawn.

    B batch, n ids of this call, T text_len, N image tokens, D width, V joint vocabulary, W columns of the grid
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.layout import TokenLayout
from dalle.nn.kv_cache import KVCacheLayout
from dalle.types import check_tokens


@dataclass(frozen=True)
class ForeignLayout(TokenLayout):
    """The stream of text ids and image tokens behind one start, whose input id is `start`, or behind none.

    Args:
        start: input id of slot 0; None has the first text id there, which nothing predicts.
        zero_is_pad: text id 0 stands for the pad of its position.
    """

    start: int | None = 0
    zero_is_pad: bool = False

    @property
    def max_caption_len(self) -> int:
        """Most tokens of a caption: all text slots."""
        return self.text_len

    @property
    def start_of_text(self) -> int | None:
        """Input id of slot 0, where it is always the same."""
        return self.start

    @property
    def unpredicted(self) -> int:
        """Ids at the beginning of a stream that no state predicts: one where there is no start."""
        return int(self.start is None)

    def pad_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """See `TokenLayout.pad_text`."""
        tokens = super().pad_text(captions, truncate)
        if self.zero_is_pad:
            tokens = torch.where(tokens == 0, self.text_vocab + torch.arange(self.text_len), tokens)
        return tokens

    def shift(self, ids: Tensor) -> Tensor:
        """What each slot reads: joint ids (B, n) -> input ids, one more for the start; nothing marks the image.

        The last image token is never read.
        """
        if self.start is None:
            return ids[:, : self.seq_len - 1]
        return torch.cat([ids.new_full((len(ids), 1), self.start), ids], dim=1)[:, : self.seq_len]

    def loss_mask(self, ids: Tensor) -> Tensor:
        """See `TokenLayout.loss_mask`."""
        mask = super().loss_mask(ids)
        mask[:, : self.unpredicted] = False
        return mask

    @property
    def text_slots(self) -> int:
        """Slots that read no image token: the start's, if there is one, and T more."""
        return self.text_len + 1 - self.unpredicted


class ForeignPlaces(KVCacheLayout):
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


class ForeignTransformer(nn.Module):
    """Joint ids -> logits, and what drawing asks of a transformer (see `dalle.transformer.Transformer`).

    A subclass has `prefill`, `decode_step`, `text_logits`, `image_logits`, `init_kv_caches`, `kv_bytes_per_sample`, and the modules `layers` and
    `to_logits`.
    """

    layout: ForeignLayout

    def __init__(self, config):
        super().__init__()
        self.config, self.layout = config, config.layout
        self.patterns: dict[str, Tensor] = {}  # ours has some, and drawing in 16 bits asks for them

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every position: joint ids (B, n) -> fp32 (B, n, V); the other modality has -inf.

        Those of a first text id that nothing predicts (`ForeignLayout.unpredicted`) mean nothing.
        """
        hidden = self.hidden(ids)
        text, image = hidden[:, : self.layout.text_len], hidden[:, self.layout.text_len :]
        logits = hidden.new_full((*hidden.shape[:2], self.layout.vocab), -torch.inf)
        logits[:, : text.shape[1], : self.layout.image_offset] = self.text_logits(text)
        logits[:, text.shape[1] :, self.layout.image_offset :] = self.image_logits(image)
        return logits

    def hidden(self, ids: Tensor) -> Tensor:
        """Joint ids (B, n) -> final states (B, n, D); state p reads ids before p, and is 0 where nothing does."""
        text, image = self.layout.unpack(ids)
        check_tokens(text, self.layout.image_offset, "text ids")
        check_tokens(image, self.layout.image_vocab, "image ids less their offset")
        lacking = self.layout.unpredicted
        states = self.prefill(self.layout.shift(ids)[:, : ids.shape[1] - lacking])
        return F.pad(states, (0, 0, lacking, 0))

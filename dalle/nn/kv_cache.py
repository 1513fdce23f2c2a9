"""Keys and values that attention still needs while sampling, in buffers of fixed size (paper section 2.2, Figure 11).

A caption's keys are computed once and shared by all candidates of it. Of the image keys a layer keeps what its
kind can yet see, W being the columns of the grid:

    row      a ring of the last W + 1
    conv     a ring of the last W (kernel + 1) / 2
    column   all, column by column, so that a step reads one column
    causal   all

A step overwrites one place and reads one group of places. Which of those places it sees comes from dalle/masks.py.

    C captions, n candidates of each, H heads, T text slots, d width of a head, N image slots
    P places that a step reads, G groups of them (the columns for "column", else one)
"""

import math

import torch
from torch import Tensor

from dalle.layout import TokenLayout
from dalle.masks import visible


class KVCacheLayout:
    """Where the image keys of one kind of layer lie, and which of them each image slot sees.

    Args:
        kind: see dalle/masks.py.
        layout: lengths of the stream.
        kernel: side of the convolution.
    """

    def __init__(self, kind: str, layout: TokenLayout, kernel: int = 11):
        rows, columns, slots = layout.rows, layout.columns, layout.num_image_tokens
        self.groups = columns if kind == "column" else 1
        near = {"row": columns + 1, "conv": columns * (kernel + 1) // 2, "column": rows, "causal": slots}
        self.size = min(near[kind], slots)  # P
        slot, place = torch.arange(slots)[:, None], torch.arange(self.size)
        if kind == "column":
            self.group, own, held = (
                slot[:, 0] % columns,
                slot[:, 0] // columns,
                place * columns + slot % columns,
            )
        else:  # the newest slot that falls on the place; below 0 where there is none yet
            self.group, own, held = slot[:, 0] * 0, slot[:, 0] % self.size, slot - (slot - place) % self.size
        self.own = self.group * self.size + own  # (N,), place of each slot among all G P
        text = layout.text_len
        self.sees = visible(kind, layout, kernel)(slot + text, held + text) & (held >= 0)  # bool (N, P)
        self.bias = torch.zeros(self.sees.shape).masked_fill(~self.sees, -torch.inf)
        self.reads = (self.sees * (place + 1)).amax(dim=1).tolist()  # places up to the last one seen
        self.hides = [not bool(sees[:count].all()) for sees, count in zip(self.sees, self.reads, strict=True)]
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> "KVCacheLayout":
        """With the tables that a step on the device reads."""
        self.group, self.own, self.bias = (table.to(device) for table in (self.group, self.own, self.bias))
        self._group, self._own = self.group.tolist(), self.own.tolist()
        return self

    def bytes(self, width: int, itemsize: int) -> int:
        """Memory of one candidate in one layer that is `width` wide: keys and values."""
        return 2 * self.groups * self.size * width * itemsize


class KVCache:
    """Keys and values of one layer: (2, C H, T, d) of the captions, (2, C H n, G P, d) of the candidates.

    Args:
        places: of the layer's kind, on the device of `like`.
        captions, candidates: C and n.
        heads, width: H and d.
        like: a tensor of the wanted device and number format.
    """

    def __init__(
        self, places: KVCacheLayout, captions: int, candidates: int, heads: int, width: int, like: Tensor
    ):
        self.places, self.captions, self.candidates, self.heads = places, captions, candidates, heads
        self.image = like.new_zeros(2, captions * heads * candidates, places.groups * places.size, width)
        self.text = like.new_zeros(2, captions * heads, 0, width)

    def fill(self, keys: Tensor, values: Tensor, text_len: int) -> None:
        """Takes the beginning of each caption's stream, (C, H, T + slots, d), for all candidates of it."""
        both = torch.stack([keys, values]).to(self.image.dtype)  # (2, C, H, T + slots, d)
        self.text = both[:, :, :, :text_len].flatten(1, 2).contiguous()
        image = both[:, :, :, text_len:].flatten(1, 2)  # (2, C H, slots, d)
        slots = image.shape[2]
        oldest = 0 if self.places.groups > 1 else max(0, slots - self.places.size)
        if slots > oldest:
            places = self.places.own[oldest:slots]
            rows = self.image.unflatten(1, (-1, self.candidates))  # (2, C H, n, G P, d)
            rows[:, :, :, places] = image[:, :, None, oldest:]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slot: int | Tensor) -> Tensor:
        """Keeps the key and value of an image slot and attends to all that it sees, by one softmax.

        Args:
            q, k, v: (C H, n, d) of that slot; q already divided by sqrt(d).
            slot: number of the image slot; as a tensor (1,) on the device every shape is the same for every slot,
                as a graph of kernels needs it, and as an int only what is seen is read.

        Returns:
            (C H, n, d).
        """
        self._write(k.flatten(0, 1), v.flatten(0, 1), slot)
        keys, values, bias = self._read(slot)  # (C H n, P, d) twice, (P,)
        to_text = q @ self.text[0].transpose(1, 2)  # (C H, n, T)
        to_image = (q.flatten(0, 1)[:, None] @ keys.transpose(1, 2)).view(*q.shape[:2], -1)  # (C H, n, P)
        if bias is not None:
            to_image = to_image + bias
        weights = torch.cat([to_text, to_image], dim=2).float().softmax(dim=2).to(q.dtype)
        from_text, from_image = weights.split([to_text.shape[2], to_image.shape[2]], dim=2)
        mixed = from_image.flatten(0, 1)[:, None] @ values  # (C H n, 1, d)
        return torch.baddbmm(mixed.view(q.shape), from_text, self.text[1])

    def _write(self, k: Tensor, v: Tensor, slot: int | Tensor) -> None:
        if isinstance(slot, int):
            place = self.places._own[slot]
            self.image[0, :, place], self.image[1, :, place] = k, v
        else:
            self.image.index_copy_(2, self.places.own[slot], torch.stack([k, v])[:, :, None])

    def _read(self, slot: int | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        places = self.places
        if isinstance(slot, int):
            start, count = places._group[slot] * places.size, places.reads[slot]
            bias = places.bias[slot, :count] if places.hides[slot] else None
            return *self.image[:, :, start : start + count].unbind(0), bias
        read = self.image
        if places.groups > 1:
            read = read.unflatten(2, (places.groups, places.size)).index_select(2, places.group[slot])[
                :, :, 0
            ]
        return *read.unbind(0), places.bias[slot]


def kv_cache_bytes(caches: list[KVCache]) -> tuple[int, int]:
    """Memory that caches hold: for a caption, and for a candidate."""
    text = sum(cache.text.nbytes // cache.captions for cache in caches)
    return text, sum(cache.image.nbytes // (cache.captions * cache.candidates) for cache in caches)


def scale_query(q: Tensor) -> Tensor:
    """Queries divided by sqrt(d), as `KVCache.attend` wants them."""
    return q / math.sqrt(q.shape[-1])

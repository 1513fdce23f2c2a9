"""KV cache for sampling: fixed-size buffers of the image keys that a layer can still see (Figure 11).

Text keys are computed once per caption and shared by its candidates. Of the image keys a layer keeps, with W
columns,

    row      a ring buffer of the last W + 1
    conv     a ring buffer of the last W (kernel + 1) / 2
    column   all of them in column-major order, so that a step reads one contiguous column
    causal   all of them

A step writes one key and reads one group of P keys; dalle/masks.py says which of the P it sees.

    C captions, n candidates of each, H heads, T text positions, d head_dim, N image positions
    P keys a step reads (the window), G groups (the columns for "column", else 1)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.layout import TokenLayout
from dalle.masks import visible


@dataclass(frozen=True)
class CachePosition:
    """What a step reads of a `KVCacheLayout` at an image position, the same for all layers of a kind."""

    position: int | Tensor
    index: int | Tensor
    """Of its own key among all G P keys."""
    keys: slice | None
    """The keys of its group that an int reads; None for a tensor, which reads all."""
    group: Tensor | None
    """(1,), its group; None for an int, or with one group."""
    bias: Tensor | None
    """-inf for the keys read but not seen; None if an int sees all that it reads."""


class KVCacheLayout:
    """Where each image position's key is stored, and which stored keys it sees.

    Args:
        sees: bool (N, P), which keys of its group a position sees; the last one is the furthest that it
            reads.
        offset: int64 (N,), index of each position's own key in its group.
        group: int64 (N,), group of each position; None is one group for all.
        groups: G.
        device: where a step reads the tensors.
    """

    def __init__(
        self, sees: Tensor, offset: Tensor, group: Tensor | None = None, groups: int = 1, device=None
    ):
        self.sees, self.groups, self.window = sees, groups, sees.shape[1]
        self.group = torch.zeros_like(offset) if group is None else group
        self.index = self.group * self.window + offset  # (N,) among all G P keys
        self.bias = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)
        # for positions given as ints, which read no further than the last key they see
        self.num_read = (sees * torch.arange(1, self.window + 1)).amax(dim=1).tolist()
        self.needs_bias = [not bool(s[:count].all()) for s, count in zip(sees, self.num_read, strict=True)]
        self.int_group, self.int_index = self.group.tolist(), self.index.tolist()
        self.group, self.index, self.bias = (x.to(device) for x in (self.group, self.index, self.bias))

    @classmethod
    def of_kind(
        cls, kind: str, layout: TokenLayout, kernel: int = 11, device: torch.device | None = None
    ) -> "KVCacheLayout":
        """The layout for an attention kind of dalle/masks.py."""
        rows, columns, tokens = layout.rows, layout.columns, layout.num_image_tokens
        window = {"row": columns + 1, "conv": columns * (kernel + 1) // 2, "column": rows, "causal": tokens}
        window = min(window[kind], tokens)
        t, slots = torch.arange(tokens), torch.arange(window)
        if kind == "column":
            group, offset = t % columns, t // columns
            held = slots * columns + t[:, None] % columns  # which position each slot holds when t is read
        else:  # the newest position that falls on the slot, negative where there is none yet
            group, offset = torch.zeros_like(t), t % window
            held = t[:, None] - (t[:, None] - slots) % window
        text = layout.text_len
        sees = visible(kind, layout, kernel)(t[:, None] + text, held + text) & (held >= 0)  # (N, P)
        return cls(sees, offset, group, columns if kind == "column" else 1, device)

    def at(self, position: int | Tensor) -> CachePosition:
        """What a step reads at an image position.

        An int reads only what is seen; a tensor (1,) on the device has the same shapes at every position, as
        compiled code and CUDA graphs need.
        """
        if isinstance(position, int):
            start, count = self.int_group[position] * self.window, self.num_read[position]
            bias = self.bias[position, :count] if self.needs_bias[position] else None
            return CachePosition(position, self.int_index[position], slice(start, start + count), None, bias)
        group = self.group[position] if self.groups > 1 else None
        return CachePosition(position, self.index[position], None, group, self.bias[position])

    def bytes(self, width: int, itemsize: int) -> int:
        """Memory for the keys and values of one candidate in one layer of `width`."""
        return 2 * self.groups * self.window * width * itemsize


class KVCache:
    """Keys and values of one layer: (2, C H, T, d) per caption, (2, C H n, G P, d) per candidate.

    Args:
        layout: of the layer's attention kind, on the device of `like`.
        captions, candidates: C and n.
        heads, head_dim: H and d.
        like: a tensor of the device and dtype to use.
    """

    def __init__(
        self, layout: KVCacheLayout, captions: int, candidates: int, heads: int, head_dim: int, like: Tensor
    ):
        self.layout, self.captions, self.candidates = layout, captions, candidates
        rows = captions * heads
        self.image = like.new_zeros(2, rows * candidates, layout.groups * layout.window, head_dim)
        self.text = like.new_zeros(2, rows, 0, head_dim)

    def prefill(self, keys: Tensor, values: Tensor, text_len: int) -> None:
        """Stores each caption's text and prefix, (C, H, T + positions, d), for all its candidates."""
        both = torch.stack([keys, values]).to(self.image.dtype).flatten(1, 2)  # (2, C H, T + positions, d)
        self.text, image = both[:, :, :text_len].contiguous(), both[:, :, text_len:]
        count = image.shape[2]
        oldest = 0 if self.layout.groups > 1 else max(0, count - self.layout.window)
        if count > oldest:
            rows = self.image.unflatten(1, (-1, self.candidates))  # (2, C H, n, G P, d)
            rows[:, :, :, self.layout.index[oldest:count]] = image[:, :, None, oldest:]

    def attend(self, qkv: Tensor, at: CachePosition) -> Tensor:
        """Stores the key and value of an image position and attends to all it sees, in one softmax.

        Args:
            qkv: query, key and value at that position, (3, C H, n, d).
            at: the position in this cache's layout.

        Returns:
            (C H, n, d).
        """
        q, new = qkv[0] / math.sqrt(qkv.shape[-1]), qkv[1:].flatten(1, 2)  # (2, C H n, d)
        if at.keys is not None:
            self.image[:, :, at.index] = new
            image = self.image[:, :, at.keys]
        else:
            image = self.image.index_copy_(2, at.index, new[:, :, None])
            if at.group is not None:
                groups = image.unflatten(2, (self.layout.groups, self.layout.window))
                image = groups.index_select(2, at.group)[:, :, 0]
        keys, values = image  # (C H n, P, d) each
        to_text = q @ self.text[0].transpose(1, 2)  # (C H, n, T)
        to_image = (q.flatten(0, 1)[:, None] @ keys.transpose(1, 2)).view(*q.shape[:2], -1)  # (C H, n, P)
        if at.bias is not None:
            to_image = to_image + at.bias
        weights = torch.cat([to_text, to_image], dim=2).float().softmax(dim=2).to(q.dtype)
        from_text, from_image = weights.split([to_text.shape[2], to_image.shape[2]], dim=2)
        mixed = from_image.flatten(0, 1)[:, None] @ values  # (C H n, 1, d)
        return torch.baddbmm(mixed.view(q.shape), from_text, self.text[1])


def positions_in(caches: list[KVCache], position: int | Tensor) -> dict[KVCacheLayout, CachePosition]:
    """An image position in the layout of each cache, whose tables are read once for all its layers."""
    at = {}
    for cache in caches:
        if cache.layout not in at:
            at[cache.layout] = cache.layout.at(position)
    return at


def kv_cache_bytes(caches: list[KVCache]) -> tuple[int, int]:
    """Measured memory of caches: per caption, and per candidate."""
    text = sum(cache.text.nbytes // cache.captions for cache in caches)
    return text, sum(cache.image.nbytes // (cache.captions * cache.candidates) for cache in caches)

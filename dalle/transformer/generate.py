"""Drawing image tokens, one slot after the other, with a cache (paper section 3: temperature 1).

B streams, T text_len, N image slots, p tokens already given
"""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from dalle.nn.cache import LayerCache
from dalle.sampling import draw
from dalle.transformer.model import Transformer


@torch.inference_mode()
def prefill(model: Transformer, ids: Tensor, copies: int = 1) -> tuple[Tensor, list[LayerCache]]:
    """Reads joint ids (B, T + p) once, then repeats each stream `copies` times.

    Returns:
        the state that predicts the next token (B * copies, D), and the caches.
    """
    caches = model.caches(len(ids))
    state = model.read(model.layout.shift(ids), 0, caches)[:, -1]
    return state.repeat_interleave(copies, dim=0), [cache.repeat(copies) for cache in caches]


@torch.inference_mode()
def draw_tokens(
    model: Transformer,
    text_tokens: Tensor,
    uniforms: Tensor,
    prefix: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
) -> Iterator[Tensor]:
    """Image tokens for captions, yielded after each slot as far as they are drawn.

    Args:
        text_tokens: int64 (C, T) from `TokenLayout.pad_text`.
        uniforms: (C, n, N), the random numbers of n candidates of each caption (`sampling.uniforms`).
        prefix: int64 (C, p), image tokens to keep at the start.
        temperature, top_k, top_p: see `sampling.draw`.
        guidance: s in unconditional + s (conditional - unconditional) logits, where the unconditional
            stream has an empty caption; None or 1 is the plain model.

    Yields:
        int64 (C, n, drawn), drawn = p + 1 .. N (once the prefix alone, if it is already whole).
    """
    layout = model.layout
    captions, candidates, slots = uniforms.shape
    if prefix is None:
        prefix = text_tokens.new_zeros(captions, 0)
    kept = prefix.shape[1]
    tokens = text_tokens.new_empty(captions * candidates, slots)
    tokens[:, :kept] = prefix.repeat_interleave(candidates, dim=0)
    if kept == slots:
        yield tokens.view(captions, candidates, slots)
        return
    noise = uniforms.reshape(-1, slots)
    if text_tokens.device.type != "mps":  # MPS has no float64: there `draw` moves a column at a time
        noise = noise.to(text_tokens.device)
    guided = guidance is not None and guidance != 1
    if guided:  # a second stream of the same picture under an empty caption
        empty = layout.pad_text([[]]).to(text_tokens).expand(captions, -1)
        text_tokens, prefix = torch.cat([text_tokens, empty]), prefix.repeat(2, 1)
    state, caches = prefill(model, layout.pack(text_tokens, prefix), candidates)
    for slot in range(kept, slots):
        logits = model.image_logits(state)
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance * (conditional - unconditional)
        tokens[:, slot] = draw(logits, noise[:, slot], temperature, top_k, top_p)
        yield tokens.view(captions, candidates, slots)[:, :, : slot + 1]
        if slot + 1 < slots:
            ids = tokens[:, slot : slot + 1] + layout.image_offset
            ids = ids.repeat(2, 1) if guided else ids
            state = model.read(ids, layout.text_len + slot + 1, caches)[:, -1]


def generate(model: Transformer, text_tokens: Tensor, uniforms: Tensor, **options) -> Tensor:
    """All image tokens at once, int64 (C, n, N); arguments as `draw_tokens`."""
    return deque(draw_tokens(model, text_tokens, uniforms, **options), maxlen=1).pop()

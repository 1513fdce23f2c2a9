"""DecodeState image tokens, one slot after the other, with a cache (paper section 3: temperature 1).

C captions, n candidates of each, B = C n rows (twice that under guidance), T text slots, N image slots
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dalle.nn.int8 import Int8Linear, weight_like
from dalle.sampling import sample_tokens
from dalle.transformer.model import Transformer

TO_GENERATE = -1
"""Stands in a beginning for a token that is to be drawn."""


def cast_linear_weights(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The same model with the matrices of its layers in another number format, and all else shared.

    Norms, embeddings and the output matrix stay as they are (appendix B.2: logits in fp32). So does a model from
    `quantize_int8`.
    """
    linear = _matrices(model, nn.Linear)
    if all(module.weight.dtype == dtype for module in linear):
        return model
    shared = _tensors(model)
    for module in linear:
        for p in module.parameters():
            shared[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(model, shared)


def quantize_int8(model: Transformer) -> Transformer:
    """The same model with matrices kept in 8 bits (dalle/nn/int8.py), and all else shared.

    They are those of the layers and the output matrix; a transformer of others keeps the latter, which it may embed
    with.
    """
    linear = _matrices(model, nn.Linear)
    if not linear:
        return model
    linear += [model.to_logits] if isinstance(model, Transformer) else []
    rounded = {id(module): Int8Linear(module) for module in linear}
    return copy.deepcopy(model, _tensors(model) | rounded)


def _matrices(model: Transformer, kinds: type | tuple[type, ...]) -> list[nn.Module]:
    return [module for module in model.layers.modules() if isinstance(module, kinds)]


def _tensors(model: Transformer) -> dict[int, Any]:
    """What a copy of the model shares with it, by identity."""
    tensors = [*model.parameters(), *model.buffers(), *model.patterns.values()]
    return {id(tensor): tensor for tensor in tensors}


def inference_autocast(model: Transformer) -> torch.autocast:
    """The context in which a model from `cast_linear_weights` reads whole streams."""
    like = weight_like(_matrices(model, (nn.Linear, Int8Linear))[0])
    return torch.autocast(like.device.type, dtype=like.dtype, enabled=like.dtype != torch.float32)


@torch.inference_mode()
def generate_tokens(
    model: Transformer,
    text_tokens: Tensor,
    uniforms: Tensor,
    prefix: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    graph: bool = False,
    compile: bool = False,
) -> Iterator[Tensor]:
    """Image tokens for captions, yielded after each slot as far as they are drawn.

    The layers compute in autocast's number format where it is on, else in that of their matrices.

    Args:
        text_tokens: int64 (C, T) from `TokenLayout.pad_text`.
        uniforms: (C, n, N), the random numbers of n candidates of each caption (`sampling.uniforms`).
        prefix: int64 (C, p), image tokens to keep at the start; among them TO_GENERATE is drawn.
        temperature, top_k, top_p: see `sampling.draw`.
        guidance: s in unconditional + s (conditional - unconditional) logits, where the unconditional
            stream has an empty caption; None or 1 is the plain model.
        graph: on CUDA, record a step once and replay it (`DecodeState.advance`).
        compile: `compiled_step`.

    Yields:
        int64 (C, n, drawn), drawn = kept + 1 .. N (once the prefix alone, if it is already whole); a view that
        later slots fill up. Nothing waits for the device.
    """
    kind = text_tokens.device.type
    if torch.is_autocast_enabled(kind):
        model = cast_linear_weights(model, torch.get_autocast_dtype(kind))
    drawing = DecodeState(model, text_tokens, uniforms, prefix, guidance, compile)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if drawing.kept == model.layout.num_image_tokens:
        yield drawing.result(drawing.kept)
        return
    advance = drawing.recorded() if graph else drawing.advance
    for slot in range(drawing.kept, model.layout.num_image_tokens):
        work = advance if slot > drawing.kept else drawing.choose
        with torch.autocast(kind, enabled=False):
            work(slot if drawing.by_number else drawing.slots[slot : slot + 1], settings)
        yield drawing.result(slot + 1)


class DecodeState:
    """What is drawn so far of n candidates of C captions, and the state from which the next token is drawn."""

    def __init__(
        self,
        model: Transformer,
        text_tokens: Tensor,
        uniforms: Tensor,
        prefix: Tensor | None,
        guidance: float | None,
        compile: bool = False,
    ):
        captions, candidates, slots = uniforms.shape
        device = text_tokens.device
        self.model, self.shape = model, (captions, candidates)
        self.step = compiled_step(model) if compile else model.decode_step
        self.by_number = device.type == "cpu" and not compile  # else every slot has the same shapes
        self.guidance = None if guidance == 1 else guidance
        precise = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.noise = uniforms.reshape(-1, slots).to(precise).to(device)
        self.slots = torch.arange(slots, device=device)
        wanted = torch.full((captions, slots), TO_GENERATE, device=device)
        if prefix is not None:
            wanted[:, : prefix.shape[1]] = prefix
        is_open = (wanted == TO_GENERATE).any(dim=0)
        self.kept = int(is_open.int().argmax()) if is_open.any() else slots
        self.tokens = wanted.repeat_interleave(candidates, dim=0)  # (B, N)
        self.wanted = self.tokens.clone() if (wanted[:, self.kept :] != TO_GENERATE).any() else None
        self._begin(text_tokens, wanted[:, : self.kept])

    def _begin(self, text_tokens: Tensor, kept: Tensor) -> None:
        """Reads captions and kept tokens once, for all candidates of each."""
        layout, (captions, candidates) = self.model.layout, self.shape
        if self.guidance is not None:  # a second stream of the same image under an empty caption
            empty = layout.pad_text([[]]).to(text_tokens).expand(captions, -1)
            text_tokens, kept = torch.cat([text_tokens, empty]), kept.repeat(2, 1)
        if kept.shape[1] == layout.num_image_tokens:
            return
        self.caches = self.model.init_kv_caches(len(text_tokens), candidates)
        ids = layout.shift(layout.pack(text_tokens, kept))
        with inference_autocast(self.model):
            state = self.model.prefill(ids, self.caches)[:, -1]
        self.state = state.repeat_interleave(candidates, dim=0)  # (B, D)

    def choose(self, slot: int | Tensor, settings: dict) -> None:
        """Draws the tokens of a slot from the state."""
        at = self.slots[slot : slot + 1] if isinstance(slot, int) else slot
        logits = self.model.image_logits(self.state)
        if self.guidance is not None:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + self.guidance * (conditional - unconditional)
        drawn = sample_tokens(logits, self.noise.index_select(1, at)[:, 0], **settings)[:, None]
        if self.wanted is not None:
            wanted = self.wanted.index_select(1, at)
            drawn = torch.where(wanted == TO_GENERATE, drawn, wanted)
        self.tokens.index_copy_(1, at, drawn)
        self.last = drawn[:, 0]

    def advance(self, slot: int | Tensor, settings: dict) -> None:
        """Reads the tokens drawn last and draws those of a slot."""
        last = self.last if self.guidance is None else self.last.repeat(2)
        self.state = self.step(last, slot, self.caches)
        self.choose(slot, settings)

    def result(self, slots: int) -> Tensor:
        """int64 (C, n, slots)."""
        return self.tokens[:, :slots].view(*self.shape, slots)

    def recorded(self) -> Callable[[Tensor, dict], None]:
        """`advance` as one graph of CUDA kernels, recorded when first called and then replayed."""
        slot, graph = self.slots[:1].clone(), None

        def replay(at: Tensor, settings: dict) -> None:
            nonlocal graph
            slot.copy_(at)
            if graph is None:
                graph = self._record(slot, settings)
            graph.replay()

        return replay

    def _record(self, slot: Tensor, settings: dict) -> torch.cuda.CUDAGraph:
        self.last = last = self.last.clone()  # read and written by every replay
        with torch.cuda.stream(side := torch.cuda.Stream()):
            side.wait_stream(torch.cuda.default_stream())
            self.advance(
                slot, settings
            )  # libraries choose their kernels; the first replay draws the slot again
        torch.cuda.default_stream().wait_stream(side)
        self.last, graph = last, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.advance(slot, settings)
            last.copy_(self.last)
        self.last = last
        return graph


def compiled_step(model: Transformer) -> Callable[..., Tensor]:
    """`model.decode_step` by torch.compile, for slots given as tensors; the first one of a shape takes a minute or more."""
    return partial(_compiled(type(model).decode_step), model)


@cache
def _compiled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One for all models of a class: torch tells them apart."""
    return torch.compile(step, dynamic=False)


def generate(model: Transformer, text_tokens: Tensor, uniforms: Tensor, **options) -> Tensor:
    """All image tokens at once, int64 (C, n, N); arguments as `generate_tokens`."""
    return deque(generate_tokens(model, text_tokens, uniforms, **options), maxlen=1).pop()

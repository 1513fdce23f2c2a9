"""A training step with tensors that have shapes and no contents: what it computes and what it holds.

The real modules run forward and backward under torch's FakeTensorMode, which allocates nothing, so a step of twelve
billion parameters is counted on a laptop in half a minute, and no formula can drift away from the code. Operators are
those of a CPU, whose fused attention holds what a GPU's does: queries, keys, values and the result.

    B batch, T text_len, N all slots
"""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dalle.clip import CLIP
from dalle.dvae import DVAE
from dalle.dvae.losses import kl_loss, reconstruction_loss
from dalle.hub.registry import build_model
from dalle.train.precision import autocast
from dalle.train.step import build_grad_scaler
from dalle.transformer import Transformer
from dalle.transformer.losses import LOGITS, chunked_cross_entropy


@dataclass(frozen=True)
class StepEstimate:
    """What one forward and backward pass over a batch takes, in floating-point operations and bytes."""

    parameters: int
    """How many the model has."""
    largest: int
    """Parameters of the largest group that sharded training gathers at once (`shards`): a layer."""
    outside: int
    """Parameters outside of these groups."""
    flops: dict[str, int]
    """Operations computed, by part; with `activation_checkpointing` the second forward pass is among them."""
    kept: int
    """Bytes that the forward pass holds for the backward pass, less parameters and their 16-bit copies."""
    copies: int
    """Bytes of the 16-bit copies of parameters that autocast holds at the end of the forward pass."""
    working: int
    """Bytes at the peak besides parameters, copies, complete gradients and what is kept: logits, the block at work."""
    together: int
    """Bytes of all these at their common peak, with the gradients that are there by then (at first none are)."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive; of a watched model without copies and complete gradients."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.peak_of_all = self.gradients = self.copies = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()
        self._parameters: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and args[0].untyped_storage() in self._parameters
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage(), copied)
        return result

    def watch(self, model: nn.Module) -> int:
        """Sets the model's copies and gradients aside from now on; returns what is alive."""
        for parameter in model.parameters():
            self._parameters.add(parameter.untyped_storage())
            parameter.register_post_accumulate_grad_hook(self._complete)
        self.peak, self.peak_of_all = self.less(), self.now
        return self.now

    def less(self) -> int:
        """Bytes alive, without copies of parameters and without gradients that are complete."""
        return self.now - self.copies - self.gradients

    def _meet(self, storage: torch.UntypedStorage, copied: bool) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size, copied)
        self.now += size
        self.copies += size if copied else 0
        self.peak, self.peak_of_all = max(self.peak, self.less()), max(self.peak_of_all, self.now)

    def _free(self, size: int, copied: bool) -> None:
        self.now -= size
        self.copies -= size if copied else 0

    def _complete(self, parameter: nn.Parameter) -> None:
        gc.collect()
        self.gradients += parameter.grad.untyped_storage().nbytes()


def estimate_step(
    kind: str, config: Any, batch: int, precision: str, pixels: tuple[int, int] | None = None
) -> StepEstimate:
    """Counts a step of a model.

    Args:
        kind: "dvae", "transformer" or "clip".
        config: of the model; a transformer's backend `auto` or `flex` is counted as torch's fused attention.
        batch: images of one process.
        precision: fp32, bf16 or fp16.
        pixels: height and width of the images, for the dVAE.
    """
    if kind == "transformer" and config.attention_backend in ("auto", "flex"):
        config = replace(config, attention_backend="sdpa")
    first, second, names = {
        "transformer": (_trunk, _logits, ("layers", "logits")),
        "dvae": (lambda model, batch: _encoder(model, batch, pixels), _decoder, ("encoder", "decoder")),
        "clip": (_image_tower, _text_tower, ("image tower", "text tower")),
    }[kind]
    count = FlopCounterMode(display=False)  # under LiveBytes, since it takes some operators apart
    with FakeTensorMode(allow_non_fake_inputs=True), _collected_in_order(), count, LiveBytes() as live:
        model = build_model(kind, config)
        if precision == "fp16":
            build_grad_scaler(model)
        start = live.watch(model)
        with autocast(precision, torch.device("cpu")):
            state = first(model, batch)
            after_first = _operations(count)
            leaf = state.detach().requires_grad_()
            loss = second(model, leaf)
            kept, copies = live.less() - start, live.copies
        gc.freeze()  # nor the forward pass: each collection looks at what came since
        loss.backward()
        after_second = _operations(count)
        state.backward(leaf.grad)
    of_second = after_second - after_first
    parts = {names[0]: _operations(count) - of_second, names[1]: of_second}
    groups = [sum(map(_count, group)) for group in model.fsdp_groups()]
    parameters = _count(model)
    return StepEstimate(
        parameters=parameters,
        largest=max(groups),
        outside=parameters - sum(groups),
        flops=_split_attention(parts)
        if kind == "transformer"
        else {n: ops.total() for n, ops in parts.items()},
        kept=kept,
        copies=copies,
        working=live.peak - start - kept,
        together=live.peak_of_all - start,
    )


@contextmanager
def _collected_in_order() -> Iterator[None]:
    """Recomputing leaves cycles of references, which Python's collector frees now or then: here when a gradient is
    complete, so that the count is the same each time."""
    was_on = gc.isenabled()
    gc.disable()
    gc.freeze()  # what is there already need not be looked at
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _operations(count: FlopCounterMode) -> Counter[str]:
    """Floating-point operations so far, by operator."""
    return Counter({str(operator): n for operator, n in count.get_flop_counts().get("Global", {}).items()})


def _split_attention(parts: dict[str, Counter[str]]) -> dict[str, int]:
    attention = sum(
        n for operator, n in parts["layers"].items() if "attention" in operator or "bmm" in operator
    )
    matrices = parts["layers"].total() - attention
    return {"attention": attention, "matrices": matrices, "logits": parts["logits"].total()}


def _trunk(model: Transformer, batch: int) -> Tensor:
    return model.prefill(torch.zeros(batch, model.layout.seq_len, dtype=torch.int64))


def _logits(model: Transformer, hidden: Tensor) -> Tensor:
    """As `cross_entropies`, with every text slot counted, as in a batch of long captions."""
    layout = model.layout
    text, image = hidden[:, : layout.text_len].flatten(0, 1), hidden[:, layout.text_len :].flatten(0, 1)
    slots, codes = (torch.zeros(len(states), dtype=torch.int64) for states in (text, image))
    at_once = [max(1, LOGITS // vocab) for vocab in (layout.image_offset, layout.image_vocab)]
    return chunked_cross_entropy(model.text_logits, (text, slots), slots, at_once[0]) + chunked_cross_entropy(
        model.image_logits, (image,), codes, at_once[1]
    )


def _encoder(model: DVAE, batch: int, pixels: tuple[int, int]) -> Tensor:
    return model.codebook_logits(torch.zeros(batch, 3, *pixels))


def _decoder(model: DVAE, logits: Tensor) -> Tensor:
    side = model.config.downsample_factor
    pixels = torch.zeros(len(logits), 3, logits.shape[2] * side, logits.shape[3] * side)
    last = logits.float().movedim(1, -1)
    noise = -(-torch.rand_like(last).log()).log()  # as `gumbel_softmax`, whose seed has a content
    codes = torch.softmax((last + noise) / 1.0, dim=-1).movedim(-1, 1)
    soft = reconstruction_loss(pixels, *model.reconstruct(codes))
    return soft + kl_loss(logits, pixels[0].numel())


def _image_tower(model: CLIP, batch: int) -> Tensor:
    side = model.config.image_size
    return model.net.encode_image(torch.zeros(batch, 3, side, side), normalize=True)


def _text_tower(model: CLIP, images: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss

    text = model.net.encode_text(
        torch.zeros(len(images), model.config.text_len, dtype=torch.int64), normalize=True
    )
    return ClipLoss()(images.float(), text.float(), model.logit_scale())

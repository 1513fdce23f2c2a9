"""FLOPs and activation memory of a training step, counted with FakeTensors.

The real modules run forward and backward under torch's FakeTensorMode, which allocates nothing: a step of
twelve billion parameters is counted on a laptop in half a minute. Operators are those of a CPU, whose fused
attention holds what a GPU's does: queries, keys, values and the result.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dalle.clip import CLIP
from dalle.dvae import DVAE
from dalle.dvae.losses import kl_loss, reconstruction_loss
from dalle.hub.registry import build_model
from dalle.planner.memory import StepEstimate
from dalle.train.grad_scaler import build_grad_scaler
from dalle.train.precision import autocast
from dalle.transformer import Transformer
from dalle.transformer.losses import LOGITS, chunked_nats


class LiveBytes(TorchDispatchMode):
    """Bytes of living storages; 16-bit copies of parameters and complete gradients are also counted apart."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.peak_of_all = self.gradients = self.copies = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()
        self._parameters: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_copy = func is torch.ops.aten._to_copy.default and args[0].untyped_storage() in self._parameters
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), is_copy)
        return result

    def watch(self, model: nn.Module) -> int:
        """From now on copies and gradients of the model are kept apart; returns the bytes alive."""
        for parameter in model.parameters():
            self._parameters.add(parameter.untyped_storage())
            parameter.register_post_accumulate_grad_hook(self._gradient_complete)
        self.peak = self.peak_of_all = self.now
        return self.now

    def activations(self) -> int:
        """Bytes alive without copies of parameters and complete gradients."""
        return self.now - self.copies - self.gradients

    def _add(self, storage: torch.UntypedStorage, is_copy: bool) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size, is_copy)
        self.now += size
        self.copies += size if is_copy else 0
        self.peak = max(self.peak, self.activations())
        self.peak_of_all = max(self.peak_of_all, self.now)

    def _free(self, size: int, is_copy: bool) -> None:
        self.now -= size
        self.copies -= size if is_copy else 0

    def _gradient_complete(self, parameter: nn.Parameter) -> None:
        gc.collect()  # activation checkpointing leaves cycles of references
        self.gradients += parameter.grad.untyped_storage().nbytes()


def estimate_step(kind: str, config: Any, batch: int, precision: str, side: int = 0) -> StepEstimate:
    """Counts a step of a model.

    Args:
        kind: "dvae", "transformer" or "clip".
        config: of the model; attention backends `auto` and `flex` are counted as torch's fused attention.
        batch: images of one process.
        precision: fp32, bf16 or fp16.
        side: pixels on a side of the images, for the dVAE.
    """
    if kind == "transformer" and config.attention_backend in ("auto", "flex"):
        config = replace(config, attention_backend="sdpa")
    flops = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), _manual_gc(), flops, LiveBytes() as live:
        model = build_model(kind, config)
        if precision == "fp16":
            build_grad_scaler(model)
        start = live.watch(model)
        with autocast(precision, torch.device("cpu")):
            if kind == "transformer":
                loss = _transformer_loss(model, batch)
            elif kind == "dvae":
                loss = _dvae_loss(model, torch.zeros(batch, 3, side, side))
            else:
                loss = _clip_loss(model, batch)
            activations, copies = live.activations() - start, live.copies
        gc.freeze()
        loss.backward()
    parameters, *groups = (
        sum(parameter.numel() for module in modules for parameter in module.parameters())
        for modules in ([model], *model.fsdp_groups())
    )
    by_operator = {str(operator): n for operator, n in flops.get_flop_counts()["Global"].items()}
    attention = sum(n for operator, n in by_operator.items() if "attention" in operator or "bmm" in operator)
    return StepEstimate(
        parameters=parameters,
        largest_group=max(groups),
        ungrouped=parameters - sum(groups),
        largest_tensor=max(parameter.numel() for parameter in model.parameters()),
        flops={"attention": attention, "matrices": sum(by_operator.values()) - attention},
        activations=activations,
        copies=copies,
        working=live.peak - start - activations,
        peak=live.peak_of_all - start,
    )


@contextmanager
def _manual_gc() -> Iterator[None]:
    """Garbage is collected only when a gradient is complete, so that the count is the same each time."""
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def _transformer_loss(model: Transformer, batch: int) -> Tensor:
    """The objective's cross-entropies, with every text position counted."""
    layout = model.layout
    hidden = model.prefill(torch.zeros(batch, layout.seq_len, dtype=torch.int64))
    text, image = hidden[:, : layout.text_len].flatten(0, 1), hidden[:, layout.text_len :].flatten(0, 1)
    positions, codes = (torch.zeros(len(states), dtype=torch.int64) for states in (text, image))
    text_chunk, image_chunk = (max(1, LOGITS // vocab) for vocab in (layout.image_offset, layout.image_vocab))
    text_nats = chunked_nats(model, text, positions, text_chunk, positions)
    return text_nats + chunked_nats(model, image, codes, image_chunk)


def _dvae_loss(model: DVAE, images: Tensor) -> Tensor:
    """The objective's loss; noise without a seed, which FakeTensors do not have."""
    logits = model.codebook_logits(images)
    by_position = logits.float().movedim(1, -1)
    noise = -(-torch.rand_like(by_position).log()).log()
    codes = torch.softmax((by_position + noise) / 1.0, dim=-1).movedim(-1, 1)
    return reconstruction_loss(images, *model.reconstruct(codes)) + kl_loss(logits, images[0].numel())


def _clip_loss(model: CLIP, batch: int) -> Tensor:
    side = model.config.image_size
    images = model.net.encode_image(torch.zeros(batch, 3, side, side), normalize=True)
    ids = torch.zeros(batch, model.config.text_len, dtype=torch.int64)
    text = model.net.encode_text(ids, normalize=True)
    return ClipLoss()(images.float(), text.float(), model.logit_scale())

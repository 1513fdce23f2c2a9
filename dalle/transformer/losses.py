"""Losses of the transformer: chunked cross-entropies of text and image tokens (2.2, B.2).

The cross-entropies of text and of image tokens are each divided by the number of such tokens in the
batch, then weighted 1/8 and 7/8. Each modality has a softmax over its own vocabulary, and logits exist
for a chunk of positions at a time: at paper size those of a batch would outweigh the model.

    B batch, T text_len, N all positions, R positions, D width
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dalle.transformer.config import TEXT_WEIGHT
from dalle.transformer.model import Transformer

LOGITS = 2**23  # at once, 32 MiB: 1,024 positions over the paper's 8,192 codes
IGNORED = -100  # F.cross_entropy's ignore_index


def logits_at_once(device: torch.device) -> int:
    """Logits that exist at once in training: 2^23, on CUDA 1/512 of the card's memory up to 2^25."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return LOGITS
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(max(LOGITS, memory // 2048), 4 * LOGITS)


def cross_entropies(
    model: Transformer,
    ids: Tensor,
    logits: int | None = None,
    text_tokens: Tensor | None = None,
    check: bool = True,
    z_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean negative log likelihood in nats per text token and per image token.

    On a GPU no shape depends on the captions, or the host would wait for their lengths: text positions that
    do not count come last, with targets that cross-entropy ignores.

    Args:
        ids: joint ids (B, N).
        logits: how many exist at once (at least one position's); by default `logits_at_once`.
        text_tokens: what the text's sum is divided by; by default the number of text tokens in `ids`.
        check: raises ValueError for an id that cannot stand where it stands, as `Transformer.hidden`.
        z_weight: of the z-loss. If not 0 each result is (2,): the mean with z_weight log(Z)^2 added, and the
            mean of log(Z)^2 alone, without gradient; Z sums over the modality's own vocabulary.
    """
    layout, logits = model.layout, logits or logits_at_once(ids.device)
    hidden = model.hidden(ids) if check else model.prefill(layout.shift(ids)[:, : ids.shape[1]])
    text, image = layout.unpack(ids)
    counts = layout.loss_mask(ids)[:, : layout.text_len]
    text_tokens = counts.sum() if text_tokens is None else text_tokens
    order = (~counts).int().flatten().argsort(stable=True)
    if ids.device.type == "cpu":
        order = order[: int(counts.sum().numpy())]
    states = hidden[:, : layout.text_len].flatten(0, 1).index_select(0, order)
    targets = text.masked_fill(~counts, IGNORED).flatten()[order]
    positions = torch.arange(layout.text_len, device=ids.device).repeat(len(ids))[order]
    at_once = [max(1, logits // vocab) for vocab in (layout.image_offset, layout.image_vocab)]
    text_nats = chunked_nats(model, states, targets, at_once[0], positions, z_weight)
    image_states = hidden[:, layout.text_len :].flatten(0, 1)
    image_nats = chunked_nats(model, image_states, image.flatten(), at_once[1], None, z_weight)
    return text_nats / text_tokens, image_nats / image.numel()


def chunked_nats(
    model: Transformer,
    states: Tensor,
    targets: Tensor,
    chunk: int,
    positions: Tensor | None = None,
    z_weight: float = 0.0,
) -> Tensor:
    """Sum of the cross-entropies of R positions, made `chunk` at a time.

    In bf16 the operands of the product are bf16, sums and logits fp32, and each chunk's gradient is made with
    it. Otherwise products are fp32 and made again in the backward pass, unless all R fit into one chunk.

    Args:
        states: (R, D).
        targets: int64 (R,), ids of the modality, or IGNORED.
        positions: int64 (R,) of text; None for image positions.
        z_weight: as `cross_entropies`; the sum is (2,) then.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        offset = model.layout.image_offset
        weight = model.to_logits.weight[offset:] if positions is None else model.to_logits.weight[:offset]
        train = torch.is_grad_enabled()
        return _NatsInBF16.apply(states, weight, targets, positions, model, chunk, train, z_weight)
    inputs = (states,) if positions is None else (states, positions)
    to_logits = model.image_logits if positions is None else model.text_logits

    def nats(targets: Tensor, *inputs: Tensor) -> Tensor:
        logits = to_logits(*inputs)
        if not z_weight:
            return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        log_sum, counted = logits.logsumexp(1), targets != IGNORED  # one pass, as cross_entropy's own
        target = logits.gather(1, targets[:, None].clamp(min=0))[:, 0]
        z = (log_sum.square() * counted).sum()
        return torch.stack([((log_sum - target) * counted).sum() + z_weight * z, z.detach()])

    if len(targets) <= chunk:
        return nats(targets, *inputs)
    parts = zip(targets.split(chunk), *(i.split(chunk) for i in inputs), strict=True)
    return sum(checkpoint(nats, *part, use_reentrant=False) for part in parts)


class _NatsInBF16(torch.autograd.Function):
    """Cross-entropies whose gradient is made in the forward pass, so that logits are computed once."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        positions: Tensor | None,
        model: Transformer,
        chunk: int,
        train: bool,
        z_weight: float,
    ) -> Tensor:
        half, matrix = states.bfloat16(), weight.bfloat16()
        total = states.new_zeros(2 if z_weight else (), dtype=torch.float32)
        by_states = torch.empty_like(states) if train else None
        by_weight = torch.zeros_like(weight) if train else None
        for start in range(0, len(states), chunk):
            part = slice(start, start + chunk)
            logits = fp32_product(half[part], matrix.T)
            if positions is not None:
                model.hide_pads(logits, positions[part])
            log_sum, counted = logits.logsumexp(1, keepdim=True), (targets[part] != IGNORED)[:, None]
            target = targets[part, None].clamp(min=0)
            nats = ((log_sum - logits.gather(1, target)) * counted).sum()
            if z_weight:
                z = (log_sum.square() * counted).sum()
                nats = torch.stack([nats + z_weight * z, z])
            total += nats
            if train:
                gradient = logits.sub_(log_sum).exp_()  # softmax, less 1 at the target
                if z_weight:
                    gradient *= 1 + 2 * z_weight * log_sum
                gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
                gradient = (gradient * counted).bfloat16()
                by_states[part] = fp32_product(gradient, matrix)
                by_weight += fp32_product(gradient.T, half[part])
        ctx.save_for_backward(by_states, by_weight)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_states, by_weight = ctx.saved_tensors
        gradient = gradient[0] if gradient.ndim else gradient
        return gradient * by_states, gradient * by_weight, None, None, None, None, None, None


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """bf16 (n, k) @ (k, m) with sums and result in fp32; by tensor cores on CUDA."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


@torch.no_grad()
def log_likelihood(model: Transformer, ids: Tensor, logits: int = LOGITS) -> tuple[Tensor, Tensor]:
    """Log likelihood of each sequence's caption and of its image tokens after it, in nats.

    Args:
        ids: joint ids (B, N).
        logits: how many exist at once (at least one position's).

    Returns:
        text (B,): sum over the caption's tokens and the pad that ends it; image (B,): sum over image tokens.
    """
    layout, hidden = model.layout, model.hidden(ids)
    text, image = layout.unpack(ids)
    counts = layout.loss_mask(ids)[:, : layout.text_len]
    at_once = [max(1, logits // (vocab * len(ids))) for vocab in (layout.image_offset, layout.image_vocab)]
    of_text = _log_probabilities(model.text_logits, hidden[:, : layout.text_len], text, at_once[0])
    of_image = _log_probabilities(
        lambda states, positions: model.image_logits(states), hidden[:, layout.text_len :], image, at_once[1]
    )
    return (of_text * counts).sum(dim=1), of_image.sum(dim=1)


def _log_probabilities(
    to_logits: Callable[..., Tensor], states: Tensor, targets: Tensor, chunk: int
) -> Tensor:
    """States (B, n, D) and targets (B, n) -> nats (B, n), `chunk` positions at a time."""
    positions = torch.arange(states.shape[1], device=states.device)
    parts = zip(states.split(chunk, 1), positions.split(chunk), targets.split(chunk, 1), strict=True)
    nats = [
        -F.cross_entropy(to_logits(some, at).flatten(0, 1), goal.flatten(), reduction="none").view(goal.shape)
        for some, at, goal in parts
    ]
    return torch.cat(nats, dim=1)


def weighted_cross_entropy(text: Tensor, image: Tensor, text_weight: float = TEXT_WEIGHT) -> Tensor:
    """The two means joined: text_weight * text + (1 - text_weight) * image."""
    return text_weight * text + (1 - text_weight) * image

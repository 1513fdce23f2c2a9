"""Initialization from trained weights (--init-from) and frozen parameters (--freeze).

The source has the same family and shape, vocabularies may be larger: the row of a text id, the pad of a
position, an image code or a grid row is copied to its place in the larger model, new rows keep their fresh
values. A model that is made to inpaint reads its new inputs, known pixels and mask, with weights of 0: it is
the same function until it is trained (GLIDE, inpainting).
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from dalle.layout import TokenLayout
from dalle.train.distributed import distribute_like, is_dtensor

GROWING = {
    "transformer": ("text_len", "grid", "text_vocab", "image_vocab"),
    "dvae": ("vocab_size",),
    "clip": ("text_len", "text_vocab"),
    "base": ("text_vocab", "inpainting"),
    "upsampler": ("text_vocab", "inpainting"),
}
"""Configuration fields that may be larger than the source's."""
UNET_BLOCKS = (
    "blocks",
    "attention",
    "middle_attention",
    "head_width",
    "heads",
    "attention_order",
    "scale_shift",
)
UNET_TEXT = ("text", "text_len", "text_width", "text_layers", "text_heads")
UNET = (
    "width",
    "channel_mult",
    *UNET_BLOCKS,
    *UNET_TEXT,
    "classes",
    "learned_variance",
    "diffusion.prediction",
)
INPUT_CONV = "input_blocks.0.0.weight"
"""Of a U-Net, by input channels."""
CLIP_TOWERS = ("vision_width", "vision_layers", "vision_pool", "text_width", "text_layers", "head_dim")
SAME = {
    "transformer": ("depth", "heads", "head_dim", "qk_norm"),
    "dvae": ("widths", "blocks_per_group", "downsample_factor", "codebook_dim", "residual_scale"),
    "clip": ("embed_width", "image_size", "patch_size", *CLIP_TOWERS),
    "base": UNET,
    "upsampler": UNET,
}
"""Fields that must be equal to the source's."""


@torch.no_grad()
def load_pretrained_weights(kind: str, model: nn.Module, source: nn.Module) -> list[str]:
    """Copies a source's weights into a fresh model of the same kind, whole or sharded, one at a time.

    Returns the fields that have grown. All processes of a sharded model call it together.
    """
    new, old = model.config, source.config
    grown = []
    for name in SAME[kind] + GROWING[kind]:
        before, after = attrgetter(name)(old), attrgetter(name)(new)
        if before == after:
            continue
        found = f"the source has {name} {before}, model.{name} is {after}"
        if name in SAME[kind]:
            allowed = ", ".join(GROWING[kind])
            raise ValueError(f"{found}; make them equal, only {allowed} may differ")
        pair = (before, after) if isinstance(before, tuple) else ((before,), (after,))
        if any(b > a for b, a in zip(*pair, strict=True)):
            raise ValueError(f"{found}; it may grow but not shrink")
        grown.append(f"{name} {before} -> {after}")
    rows, parameters = _rows_of(kind, old, new), dict(model.named_parameters())
    for name, value in source.named_parameters():
        parameter = parameters[name]
        value = value.to(parameter.device)
        if name in rows:
            dimension, indices = rows[name]
            whole = parameter.full_tensor() if is_dtensor(parameter) else parameter
            if name == INPUT_CONV:
                whole = torch.zeros_like(whole)
            value = whole.index_copy(dimension, indices.to(value.device), value)
        parameter.copy_(distribute_like(value, parameter))
    return grown


def map_token_ids(old: TokenLayout, new: TokenLayout) -> Tensor:
    """Input ids of a layout -> those of a larger one: int64 (embedding_size of the old)."""
    parts = (
        torch.arange(old.text_vocab),
        new.text_vocab + torch.arange(old.text_len),  # the pad of each position
        new.image_offset + torch.arange(old.image_vocab),
        torch.tensor([new.start_of_text, new.start_of_image]),
    )
    return torch.cat(parts)


def _rows_of(kind: str, old: Any, new: Any) -> dict[str, tuple[int, Tensor]]:
    """Parameter -> (dimension, new index of each row of the source)."""
    if kind == "dvae":
        codes, output = torch.arange(old.vocab_size), "encoder.blocks.output.conv"
        return {f"{output}.w": (0, codes), f"{output}.b": (0, codes), "decoder.blocks.input.w": (1, codes)}
    if kind in ("base", "upsampler"):
        channels = torch.arange(new.in_channels)  # noised, known pixels and their mask, smaller image
        if new.inpainting and not old.inpainting:
            channels = torch.cat([channels[:3], channels[7:]])
        rows = {INPUT_CONV: (1, channels)}
        if new.text == "ids":
            rows["token_embedding.weight"] = (0, torch.arange(old.text_vocab))
        return rows
    if kind == "clip":
        ids = torch.cat([torch.arange(old.text_vocab), torch.tensor([new.text_vocab, new.text_vocab + 1])])
        positions = torch.arange(old.text_len)
        return {"net.token_embedding.weight": (0, ids), "net.positional_embedding": (0, positions)}
    ids = map_token_ids(old.layout, new.layout)
    return {
        "token_embedding.weight": (0, ids),
        "to_logits.weight": (0, ids[: old.layout.vocab]),
        "text_position.weight": (0, torch.arange(old.layout.text_len)),
        "row.weight": (0, torch.arange(old.layout.rows)),
        "column.weight": (0, torch.arange(old.layout.columns)),
    }


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freezes parameters whose names match a pattern (`*` matches anything); returns their names."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = f"{', '.join(names[:3])}, {names[-1]}"
            raise ValueError(f"--freeze {pattern!r} matches no parameter; their names are such as {known}")
    frozen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(frozen) == len(names):
        raise ValueError(f"--freeze {' '.join(patterns)} leaves nothing to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    return frozen

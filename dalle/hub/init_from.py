"""Starting from weights that were trained before: of the same family and shape, with vocabularies that may be
larger.

A row that stands for something (a text id, the pad of a position, an image code, a row of the grid) is copied
to where that thing stands in the larger model; everything new keeps the values of a fresh model. Frozen
parameters stay as they
are: they have no gradient, no moments and no average of their own.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dalle.layout import TokenLayout

Rows = dict[str, tuple[int, Tensor]]
"""Parameter -> (dimension, where in it each row of the source goes)."""

GROWING = {
    "transformer": ("text_len", "grid", "text_vocab", "image_vocab"),
    "dvae": ("vocab_size",),
    "clip": ("text_len", "text_vocab"),
}
"""Fields of the configuration that may be larger than the source's."""
SAME = {
    "transformer": ("depth", "heads", "head_dim"),
    "dvae": ("widths", "blocks_per_group", "downsample_factor", "codebook_dim", "residual_gain"),
    "clip": (
        "embed_width",
        "image_size",
        "patch_size",
        "vision_width",
        "vision_layers",
        "vision_pool",
        "text_width",
        "text_layers",
        "head_dim",
    ),
}
"""Fields that must be equal to the source's."""


@torch.no_grad()
def load_pretrained_weights(kind: str, model: nn.Module, source: nn.Module) -> list[str]:
    """Copies a source's weights into a fresh model of the same kind.

    Returns:
        which fields have grown, one line each.

    Raises:
        ValueError: a field that must be equal is not, or one that may grow is smaller than the source's.
    """
    new, old = model.config, source.config
    for name in SAME[kind]:
        if getattr(new, name) != getattr(old, name):
            raise ValueError(
                f"the source has {name} {getattr(old, name)}, model.{name} is {getattr(new, name)}; "
                "make them equal, only " + ", ".join(GROWING[kind]) + " may differ"
            )
    for name in GROWING[kind]:
        if any(a < b for a, b in zip(_sizes(new, name), _sizes(old, name), strict=True)):
            raise ValueError(
                f"the source has {name} {getattr(old, name)}, model.{name} is only {getattr(new, name)}; "
                "it may grow but not shrink"
            )
    rows, parameters = ROWS[kind](old, new), dict(model.named_parameters())
    for name, value in source.named_parameters():
        value = value.to(parameters[name].device)
        if name in rows:
            dimension, places = rows[name]
            parameters[name].index_copy_(dimension, places.to(value.device), value)
        else:
            parameters[name].copy_(value)
    return [
        f"{name} {getattr(old, name)} -> {getattr(new, name)}"
        for name in GROWING[kind]
        if getattr(old, name) != getattr(new, name)
    ]


def _sizes(config: Any, name: str) -> tuple[int, ...]:
    value = getattr(config, name)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def joint_ids(old: TokenLayout, new: TokenLayout) -> Tensor:
    """Where each input id of one layout stands in a larger one: int64 (embedding_size of the old)."""
    parts = (
        torch.arange(old.text_vocab),
        new.text_vocab + torch.arange(old.text_len),  # the pad of each position
        new.image_offset + torch.arange(old.image_vocab),
        torch.tensor([new.start_of_text, new.start_of_image]),
    )
    return torch.cat(parts)


def _transformer_rows(old: Any, new: Any) -> Rows:
    ids = joint_ids(old.layout, new.layout)
    return {
        "token_embedding.weight": (0, ids),
        "to_logits.weight": (0, ids[: old.layout.vocab]),
        "text_position.weight": (0, torch.arange(old.layout.text_len)),
        "row.weight": (0, torch.arange(old.layout.rows)),
        "column.weight": (0, torch.arange(old.layout.columns)),
    }


def _dvae_rows(old: Any, new: Any) -> Rows:
    codes = torch.arange(old.vocab_size)
    output, codebook = "encoder.blocks.output.conv", "decoder.blocks.input"
    return {f"{output}.w": (0, codes), f"{output}.b": (0, codes), f"{codebook}.w": (1, codes)}


def _clip_rows(old: Any, new: Any) -> Rows:
    ids = torch.cat([torch.arange(old.text_vocab), torch.tensor([new.pad, new.end])])
    return {
        "net.token_embedding.weight": (0, ids),
        "net.positional_embedding": (0, torch.arange(old.text_len)),
    }


ROWS = {"transformer": _transformer_rows, "dvae": _dvae_rows, "clip": _clip_rows}


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Takes the gradient from parameters whose names fit a pattern (`*` stands for anything); returns their
    names.

    Raises:
        ValueError: a pattern that fits no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"--freeze {pattern!r} fits no parameter; their names are such as {', '.join(names[:3])}, "
                f"{names[-1]}"
            )
    frozen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(frozen) == len(names):
        raise ValueError(f"--freeze {' '.join(patterns)} leaves nothing to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    return frozen

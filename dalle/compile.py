"""torch.compile for code that runs with several shapes: training, evaluation and sampling in one process."""

from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import nn

VARIANTS = 64
"""Of one function, as attention kinds, with and without gradients, number formats and shapes make them. Torch
allows 8, and beyond its limit runs the function uncompiled with one warning."""


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled once for each shape, the same for all who ask."""
    _allow_variants()
    return torch.compile(function, dynamic=False)


def compile_layers(model: nn.Module, sharded: bool = False, **options) -> None:
    """Compiles each layer of the model's ModuleLists, or each child if there are none; names do not change.

    Of a sharded model it compiles what FSDP2 gathers at once, within FSDP2's hooks, which stay as they are. A
    second batch size compiles a layer once more, for all further ones.
    """
    _allow_variants()
    if sharded:
        for part in chain.from_iterable(model.fsdp_groups()):
            part.forward = torch.compile(part.forward, **options)
        return
    layers = [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    for part in layers or model.children():
        part.compile(**options)


def _allow_variants() -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)

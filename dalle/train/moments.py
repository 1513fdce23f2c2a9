"""AdamW with mean and variance in 8 bits (Dettmers et al. 2022), from torchao: a quarter of their memory.

Blocks of 256 values share a scale; tensors below 4,096 values keep fp32. torchao compiles its update, so the first
one takes longer, and on a CPU it needs a C++ compiler. What it stores are tensors of a class of its own; a
checkpoint holds the two plain tensors inside, codes and scales, so that reading one runs no code.
"""

from typing import Any

import torch
from torch import Tensor

from dalle.train.dtensor import placed

INNER = ("codes", "scale")
"""What changes in torchao's tensors; the table of the 256 values that codes stand for does not."""


def adamw_8bit(parameters: list[Tensor], **settings: Any) -> torch.optim.Optimizer:
    """torchao's AdamW8bit.

    Raises:
        ImportError: torchao is not there.
        ValueError: a parameter is sharded.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ImportError('8-bit moments need torchao: pip install "zeroshot-text2image[lowbit]"') from None
    if any(hasattr(p, "to_local") for p in parameters):
        raise ValueError(
            "8-bit moments of sharded parameters cannot be saved for another number of processes; "
            "set optimizer.moments to fp32, or --parallel to none or ddp"
        )
    return AdamW8bit(parameters, **settings)


def plain(moment: str, value: Tensor) -> dict[str, Tensor]:
    """A moment as plain tensors by name: itself, or "exp_avg.codes" and "exp_avg.scale"."""
    if hasattr(value, "codes"):
        return {f"{moment}.{inner}": getattr(value, inner) for inner in INNER}
    return {moment: value}


def put(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str, tensor: Tensor) -> None:
    """Puts a plain tensor back where `plain` took it from; an optimizer of 8 bits rounds moments of fp32.

    Raises:
        ValueError: moments of 8 bits for an optimizer of fp32.
    """
    moment, _, inner = name.partition(".")
    state, in_8bit = optimizer.state[parameter], hasattr(optimizer, "_new_buffer")
    if inner and not in_8bit:
        raise ValueError(
            "the checkpoint has moments of 8 bits; set optimizer.moments to 8bit to go on from it"
        )
    if moment not in state:
        if moment == "step":
            state[moment] = torch.empty_like(tensor, device="cpu" if in_8bit else parameter.device)
        elif in_8bit:
            state[moment] = optimizer._new_buffer(parameter, signed=moment == "exp_avg")
        else:
            state[moment] = torch.empty_like(
                parameter, dtype=tensor.dtype
            )  # fused kernels want these strides
    target = getattr(state[moment], inner) if inner else state[moment]
    target.copy_(placed(tensor, target))

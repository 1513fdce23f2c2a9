"""FlexAttention over blocks of visible pairs: on a GPU, work only where something is visible (2.2).

Two thirds of the 128 x 128 blocks of a row layer hold no visible pair at paper size. A column layer in raster
order touches as many blocks as a causal one, so it exchanges rows and columns of the image states (Figure
11c).
"""

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dalle.compile import compiled

if TYPE_CHECKING:
    from dalle.nn.attention import SparseMask

NARROWEST = 16  # head width of the kernel on CUDA
REMEDY = "set model.attention_backend to auto, window, sdpa or dense"


def flex_attend(q: Tensor, k: Tensor, v: Tensor, pattern: "SparseMask") -> Tensor:
    """Attention of the whole sequence (B, H, N, d), of column layers `pattern.to_column_major`.

    Raises:
        ValueError: gradients are wanted on a CPU, for which FlexAttention has none.
    """
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError(f"backend flex has no gradients on cpu; {REMEDY}")
        # it refuses such tensors even where no gradient is recorded
        q, k, v = q.detach(), k.detach(), v.detach()
    # on CUDA a compiled kernel, by whoever compiles the layer or by us; on CPU the same rule over all pairs
    plain = q.device.type == "cpu" or torch.compiler.is_compiling()
    attention = flex_attention if plain else compiled(flex_attention)
    return attention(q, k, v, block_mask=pattern.blocks(q.device))


def flex_refusal(device: torch.device, head_dim: int) -> str | None:
    """Why FlexAttention cannot run there, as a sentence, or None."""
    if device.type not in ("cuda", "cpu"):
        return f"backend flex does not run on {device.type}; {REMEDY}"
    if device.type == "cuda" and not _triton():
        return f"backend flex needs triton on cuda, which is not installed; {REMEDY}"
    if device.type == "cuda" and head_dim < NARROWEST:
        return f"backend flex needs heads at least {NARROWEST} wide, got {head_dim}; {REMEDY}"
    return None


@cache
def _triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()

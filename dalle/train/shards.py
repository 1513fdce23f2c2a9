"""Tensors of which each process holds a slice (torch's DTensor), beside plain ones: the same words for both."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a slice of it only."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it; shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it: slices are gathered, so every process must call this; a plain tensor is itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, sliced as another one is; no process waits for another."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # seconds that a single process need not spend

    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scales the gradients so that their norm, over all parameters and all slices, is at most `limit`.

    Returns:
        the norm before, a plain scalar, the same in every process.
    """
    having = [p for p in parameters if p.grad is not None]
    kinds = [kind for sharded in (False, True) if (kind := [p for p in having if is_sharded(p) == sharded])]
    norms = torch.stack([whole(get_total_norm([p.grad for p in kind])) for kind in kinds])
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(norms)
    for kind in kinds:
        clip_grads_with_norm_(kind, limit, norm)
    return norm

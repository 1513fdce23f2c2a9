"""Tensors of which each process holds a slice (torch's DTensor), beside plain ones: the same words for both."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


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
    if is_sharded(tensor) or not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # seconds that a single process need not spend

    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm over all gradients and all slices of them: a plain scalar, the same in every process."""
    norms = torch.stack([whole(get_total_norm(kind)) for kind in _kinds(parameters)])
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(norms)


def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, limit: float) -> None:
    """Scales the gradients, whose norm is given, so that it is at most `limit`."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for kind in _kinds(parameters):
        torch._foreach_mul_([local(gradient) for gradient in kind], scale)


def _kinds(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The gradients: whole ones, and those of which each process holds a slice."""
    having = [p.grad for p in parameters if p.grad is not None]
    kinds = ([g for g in having if is_sharded(g) == sharded] for sharded in (False, True))
    return [kind for kind in kinds if kind]

"""FSDP2 sharding of a model, and helpers for tensors that may be DTensors."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this process holds a shard of the tensor only."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's shard, sharing its memory; a plain tensor is itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A full tensor, the same in every process, sharded as `like` is; no communication."""
    if is_dtensor(tensor) or not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes seconds to import

    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm over all gradients and all their shards: a plain scalar, the same in every process."""
    norms = [get_total_norm(gradients) for gradients in _split_by_sharding(parameters)]
    full = torch.stack([norm.full_tensor() if is_dtensor(norm) else norm for norm in norms])
    return full[0] if len(full) == 1 else torch.linalg.vector_norm(full)


def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales the gradients, whose norm is `norm`, to a norm of at most `max_norm`."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for gradients in _split_by_sharding(parameters):
        torch._foreach_mul_([local(gradient) for gradient in gradients], scale)


def _split_by_sharding(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The gradients in two lists, plain and sharded; an empty list is left out."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    lists = ([g for g in gradients if is_dtensor(g) == sharded] for sharded in (False, True))
    return [gradients for gradients in lists if gradients]


class ForwardProxy(nn.Module):
    """A model whose only call is forward(f, ...) = f(model, ...), which DDP and FSDP hook."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


def shard_model(
    model: nn.Module, mesh: Any, precision: str, ignored: list[nn.Parameter], by_longer_side: bool
) -> nn.Module:
    """Shards a model by FSDP2: each group of `model.fsdp_groups()` by itself, everything else together.

    Args:
        model: the same weights in every process.
        mesh: DeviceMesh.
        precision: bf16 and fp16 gather the groups in 16 bit.
        ignored: parameters left whole.
        by_longer_side: shard matrices by their longer side, where PowerSGD's factors are smallest.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    model.to(memory_format=torch.contiguous_format)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    placement = (lambda p: Shard(shard_dim(p.shape, mesh.size()))) if by_longer_side else None
    groups = model.fsdp_groups() if hasattr(model, "fsdp_groups") else []
    for group in groups:
        fully_shard(group, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    for before, after in pairwise(groups):
        before[0].set_modules_to_forward_prefetch([after[0]])
        after[0].set_modules_to_backward_prefetch([before[0]])
    proxy = ForwardProxy(model)
    return fully_shard(proxy, mesh=mesh, ignored_params=set(ignored), shard_placement_fn=placement)


def shard_dim(shape: tuple[int, ...], shards: int) -> int:
    """The dimension of a parameter to shard: the longer side of a matrix (E.2), where factors are smallest.

    FSDP2 shards other dimensions than the first only evenly; a matrix that does not divide is sharded by it.
    """
    return int(len(shape) == 2 and shape[1] > shape[0] and shape[1] % shards == 0)

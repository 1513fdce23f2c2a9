"""Sharded training by FSDP2: groups of layers, and the slices of parameters that a process builds."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


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
    """Shards a model by FSDP2: each group of `model.fsdp_groups()` alone, everything else together.

    `by_longer_side` shards matrices where PowerSGD's factors are smallest.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    model.to(memory_format=torch.contiguous_format)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    placement = (lambda p: Shard(shard_dim(p.shape, mesh.size()))) if by_longer_side else None
    groups = model.fsdp_groups()
    for group in groups:
        fully_shard(group, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    for before, after in pairwise(groups):
        before[0].set_modules_to_forward_prefetch([after[0]])
        after[0].set_modules_to_backward_prefetch([before[0]])
    proxy = ForwardProxy(model)
    for parameter in ignored:  # FSDP2 moves only what it shards
        parameter.data = parameter.data.to(mesh.device_type)
    return fully_shard(proxy, mesh=mesh, ignored_params=set(ignored), shard_placement_fn=placement)


def shard_dim(shape: tuple[int, ...], shards: int) -> int:
    """The dimension to shard: the longer side of a matrix (E.2), unless FSDP2 cannot divide it evenly."""
    return int(len(shape) == 2 and shape[1] > shape[0] and shape[1] % shards == 0)


def local_slice(whole: Tensor, mesh: Any, by_longer_side: bool) -> Tensor:
    """This process's slice of a parameter under `shard_model`, a copy on the mesh's device."""
    dim = shard_dim(whole.shape, mesh.size()) if by_longer_side else 0
    parts, rank = whole.chunk(mesh.size(), dim), mesh.get_local_rank()
    part = parts[rank] if rank < len(parts) else whole.narrow(dim, 0, 0)
    return part.to(mesh.device_type).clone(memory_format=torch.contiguous_format)


def assign_slices(model: nn.Module, slices: dict[str, Tensor]) -> None:
    """Slices by parameter into a sharded model on the meta device, which takes the tensors themselves."""
    if not slices:
        return
    from torch.distributed.tensor import DTensor  # takes seconds to import

    values = {}
    for name, parameter in model.named_parameters():
        if name in slices:
            mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
            values[name] = DTensor.from_local(
                slices[name], mesh, placements, run_check=False, shape=shape, stride=parameter.stride()
            )
    model.load_state_dict(values, strict=False, assign=True)

"""Many processes, one training (paper section 2.5): PyTorch's DDP, FSDP2 and DeviceMesh behind one small class.

    none   one process
    ddp    each process holds all of the model; gradients are averaged
    fsdp   each holds a slice of every parameter, gradient and moment; layers are gathered as they are needed
    hsdp   slices among the processes of a machine, copies between machines, as the paper's

torchrun starts the processes. Each takes its part of every step's batch; the parts, in the order of the ranks, are
the batch of a single process, and so are loss, gradient and update, but for rounding.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dalle.train.dtensor import local
from dalle.train.low_rank import shard_side
from dalle.train.precision import resolve_device
from dalle.types import BatchShard

Mode = Literal["none", "ddp", "fsdp", "hsdp"]
TIMEOUT = timedelta(minutes=15)
"""How long a process waits for the others in a step: longer than a data worker may take (10 minutes)."""
ANSWER = timedelta(seconds=20)
"""How long one that hung may take to answer."""


class Parallel:
    """This process among those that train together; `Parallel()` is one that trains alone.

    Args:
        mode: see above.
        device: of this process.
        rank, world: which process of how many.
        shard: processes that share one set of parameters; all unless given, and only asked for by hsdp.

    Attributes:
        mesh: DeviceMesh; ("shard",) for fsdp, ("replicate", "shard") for hsdp, else None.
        door: what `wrap` made of the model, a DDP or FSDP module around it; None in a single process.
    """

    def __init__(
        self,
        mode: Mode = "none",
        device: torch.device | None = None,
        rank: int = 0,
        world: int = 1,
        shard: int | None = None,
    ):
        self.mode, self.device, self.rank, self.world = mode, device or torch.device("cpu"), rank, world
        self.mesh: Any = None
        self.door: Any = None
        self.averaged = True
        self._scalars: list[nn.Parameter] = []
        self._roll: Any = None
        self._stdout = sys.stdout
        if self.sharded:
            from torch.distributed.device_mesh import (
                init_device_mesh,  # seconds that a single process need not spend
            )

            shard = shard or world
            shape, names = ((world,), ("shard",)) if mode == "fsdp" else ((world // shard, shard), HSDP_AXES)
            self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    @classmethod
    def start(
        cls, mode: Mode, device: str = "auto", shard: int | None = None, timeout: timedelta = TIMEOUT
    ) -> "Parallel":
        """Joins the processes that torchrun started; with mode "none" a single one.

        Only the first process prints from then on. One that waits longer than `timeout` for the others ends with an
        error that names who does not answer (over NCCL it is the watchdog that ends it and tells the collective).

        Raises:
            ValueError: mode, torchrun, devices and `shard` do not go together.
        """
        world = _check_start(mode, shard)
        if mode == "none":
            return cls(device=resolve_device(device))
        rank, own = int(os.environ["RANK"]), _own_device(device)
        if own.type == "cuda":
            torch.cuda.set_device(own)
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=timeout)
        parallel = cls(mode, own, rank, world, shard or int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        parallel._roll = dist.new_group(backend="gloo")
        if not parallel.is_main:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed by `close`
        return parallel

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds slices only."""
        return self.mode in ("fsdp", "hsdp")

    @property
    def replicas(self) -> Any:
        """The process group of those that hold the same parameters as this one; None if no other does."""
        if self.mode == "ddp":
            return dist.group.WORLD
        return self.mesh["replicate"].get_group() if self.mode == "hsdp" else None

    # -----------------------------------------------------------------------------------------
    # The model
    # -----------------------------------------------------------------------------------------

    def wrap(self, model: nn.Module, precision: str, averaged: bool = True) -> None:
        """Hands the model to DDP or FSDP2, before optimizers are built; its names of weights stay as they are.

        Under fsdp and hsdp the groups of `model.fsdp_groups()` are gathered one by one, in 16 bit under bf16 and fp16 (as
        autocast would make them), the next one ahead of time; everything else once a step in fp32: norms,
        embeddings, outputs (appendix D, guideline 2). Gradients are averaged in fp32.

        Args:
            model: the same weights in every process.
            precision: fp32, bf16 or fp16.
            averaged: whether replicas average their gradients here; else each keeps its own, for PowerSGD.
        """
        self.averaged = averaged
        if self.mode == "ddp":
            self.door = (
                DistributedDataParallel(Door(model), **{BUFFERS_OPTION: False}) if averaged else Door(model)
            )
        elif self.sharded:
            self.door = self._shard(model.to(memory_format=torch.contiguous_format), precision)

    def _shard(self, model: nn.Module, precision: str) -> nn.Module:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import Shard

        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        groups = model.fsdp_groups() if hasattr(model, "fsdp_groups") else []
        mesh = self.mesh if self.averaged else self.mesh["shard"]
        cut = (
            None if self.averaged else lambda p: Shard(shard_side(p.shape, mesh.size()))
        )  # where factors are smallest
        for group in groups:
            fully_shard(group, mesh=mesh, mp_policy=policy, shard_placement_fn=cut)
        for before, after in pairwise(groups):
            before[0].set_modules_to_forward_prefetch([after[0]])
            after[0].set_modules_to_backward_prefetch([before[0]])
        self._scalars = [p for p in model.parameters() if p.ndim == 0]  # FSDP2 takes none
        return fully_shard(Door(model), mesh=mesh, ignored_params=set(self._scalars), shard_placement_fn=cut)

    def run(self, model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
        """function(model, *args) as the one forward pass that DDP and FSDP watch, whatever methods it calls.

        Every process must call it. What it returns is a tensor, or a tuple or dict of them.
        """
        return self.door(function, *args) if self.door else function(model, *args)

    def release(self) -> None:
        """Frees what a pass without gradients has left gathered."""
        if self.sharded:
            self.door.reshard()

    # -----------------------------------------------------------------------------------------
    # A step
    # -----------------------------------------------------------------------------------------

    def part(self, number: int, passes: int, counts: Tensor | None) -> BatchShard:
        """What pass `number` of `passes` in this process sees of a step's batch."""
        if self.world == 1:
            return BatchShard(number, passes, counts)
        return BatchShard(self.rank * passes + number, self.world * passes, counts, self.all_sum, self.gather)

    @contextmanager
    def collecting(self, last: bool) -> Iterator[None]:
        """Around a pass of several whose gradients add up: what can wait for the last pass does.

        ddp averages in the last pass only. fsdp reduces slices in each, or every process would hold the gradient
        of all parameters; hsdp does so within a machine and averages between machines in the last.
        """
        if self.mode == "ddp" and self.averaged and not last:
            with self.door.no_sync():
                yield
            return
        if self.mode == "hsdp" and self.averaged:
            self.door.set_requires_all_reduce(last)
        yield

    def finish_gradients(self, model: nn.Module, passes: int) -> None:
        """After the last pass: means of what neither DDP nor FSDP has averaged."""
        for scalar in self._scalars:
            if scalar.grad is not None:
                scalar.grad = self.all_mean(scalar.grad)
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        if passes > 1 and gradients:
            torch._foreach_div_(gradients, passes)

    # -----------------------------------------------------------------------------------------
    # Words between processes; a single one hears itself
    # -----------------------------------------------------------------------------------------

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, without gradient."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def all_mean(self, tensor: Tensor) -> Tensor:
        """Mean over the processes, without gradient."""
        return self.all_sum(tensor) / self.world

    def all_true(self, flags: Tensor) -> Tensor:
        """bool: true where it is in every process."""
        return self._reduced(flags.int(), dist.ReduceOp.MIN).bool()

    def _reduced(self, tensor: Tensor, op: Any) -> Tensor:
        if self.world == 1:
            return tensor.detach()
        result = tensor.detach().clone()
        dist.all_reduce(result, op)
        return result

    def gather(self, rows: Tensor) -> Tensor:
        """(B, ...) of each process -> (world * B, ...), in the order of the ranks; gradients flow back to each."""
        return _Gather.apply(rows)

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves the others; this process prints again."""
        if sys.stdout is not self._stdout:
            sys.stdout.close()
            sys.stdout = self._stdout
        if self.mode != "none" and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> "Parallel":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._roll is not None and isinstance(error, RuntimeError) and "timed out" in str(error).lower():
            try:
                dist.monitored_barrier(self._roll, ANSWER, wait_all_ranks=True)
            except RuntimeError as missing:
                error.add_note(f"A process hung or is gone: {missing}")
        self.close()


BUFFERS_OPTION = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")  # as torch calls it from 2.15 on, and before
    if name in signature(DistributedDataParallel).parameters
)
HSDP_AXES = ("replicate", "shard")


class Door(nn.Module):
    """A model behind a single `forward`, which is all that DDP and FSDP watch: forward(f, ...) is f(model, ...)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


class _Gather(torch.autograd.Function):
    """Rows of all processes; a row's gradient is the sum of what all of them made of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _check_start(mode: Mode, shard: int | None) -> int:
    """The number of processes; ValueError for what cannot be."""
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if started else 1
    if shard is not None and mode != "hsdp":
        raise ValueError(f"shard is for --parallel hsdp, not for {mode}; leave it out")
    if mode == "none" and world > 1:
        raise ValueError(
            f"torchrun started {world} processes, and with --parallel none each would train alone; "
            "add --parallel ddp, fsdp or hsdp, or start it without torchrun"
        )
    if mode != "none" and not started:
        raise ValueError(
            f"--parallel {mode} needs torchrun, which starts its processes: "
            f"torchrun --nproc-per-node 2 SCRIPT ... --parallel {mode}"
        )
    if mode == "hsdp":
        size = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if shard is None else shard
        if size < 1 or world % size:
            raise ValueError(
                f"{world} processes do not divide into groups of {size} that share one set of parameters; "
                "give --shard a divisor, or start as many processes on each machine"
            )
    return world


def _own_device(name: str) -> torch.device:
    """The device of this process, by its number on the machine."""
    device, number = resolve_device(name), int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ValueError(f"--device {name} cannot be shared among processes; give cuda, cpu or auto")
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"process {number} of this machine has no GPU, there are {torch.cuda.device_count()}; "
            "lower --nproc-per-node, or give --device cpu"
        )
    return torch.device("cuda", number)

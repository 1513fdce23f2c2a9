"""Data-parallel training (Section 2.5): DDP, FSDP2 and hybrid sharding over PyTorch's DeviceMesh.

    none   one process
    ddp    each process holds the whole model; gradients are averaged
    fsdp   each process holds a shard of every parameter, gradient and moment; layers are gathered as needed
    hsdp   shards among the processes of a machine, replicas between machines, as in the paper

torchrun starts the processes. Each takes its shard of a step's batch; loss, gradient and update equal those
of a single process up to rounding.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dalle.train.config import TIMEOUT_MINUTES, Mode
from dalle.train.dtensor import ForwardProxy, local, shard_model
from dalle.train.precision import local_device, resolve_device
from dalle.types import BatchShard

T = TypeVar("T")
MONITOR_TIMEOUT = timedelta(seconds=20)
"""Time a process has to answer when another one has timed out."""


class Distributed:
    """This process among those that work together; `Distributed()` is a single process.

    Args:
        mode: see above.
        device: of this process.
        rank: of this process.
        world_size: number of processes.
        shard: processes that share one set of parameters, for hsdp; default: all.

    Attributes:
        mesh: DeviceMesh, ("shard",) for fsdp and ("replicate", "shard") for hsdp, else None.
        wrapped: the DDP or FSDP module made by `wrap`; None in a single process.
        control: gloo group for small messages on the CPU; None is the default group.
    """

    def __init__(
        self,
        mode: Mode = "none",
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
        shard: int | None = None,
    ):
        self.mode, self.rank, self.world_size = mode, rank, world_size
        self.device = device or torch.device("cpu")
        self.mesh: Any = None
        self.wrapped: Any = None
        self.control: Any = None
        self.is_main = rank == 0  # writes and prints for all
        self.sharded = mode in ("fsdp", "hsdp")  # each process holds shards of the parameters
        self.averaged = True
        self._scalars: list[nn.Parameter] = []
        self._stdout = sys.stdout
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh  # takes seconds to import

            replicas = 1 if mode == "fsdp" else world_size // (shard or world_size)
            dims = {"shard": world_size // replicas}
            if mode == "hsdp":
                dims = {"replicate": replicas} | dims
            self.mesh = init_device_mesh(self.device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))

    @classmethod
    def start(
        cls,
        mode: Mode,
        device: str = "auto",
        shard: int | None = None,
        timeout: timedelta = timedelta(minutes=TIMEOUT_MINUTES),
    ) -> "Distributed":
        """Joins the processes that torchrun started for a training; mode "none" is a single process.

        Only rank 0 prints from then on. A process that waits longer than `timeout` ends with an error that
        names the ranks that do not answer (over NCCL the watchdog names the collective).

        Raises:
            ValueError: mode, torchrun, devices and `shard` do not match.
        """
        world_size = _check_launch(mode, shard)
        if mode == "none":
            return cls(device=resolve_device(device))
        own = local_device(device)
        if own.type == "cuda":
            torch.cuda.set_device(own)
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=timeout)
        per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        group = cls(mode, own, dist.get_rank(), world_size, shard or per_machine)
        group.control = dist.new_group(backend="gloo")
        if not group.is_main:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed by `__exit__`
        return group

    @classmethod
    @contextmanager
    def join(cls, device: str = "auto", timeout: timedelta = timedelta(days=7)) -> Iterator["Distributed"]:
        """Context of the processes that divide work, as sampling; a single one without torchrun."""
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if world_size == 1:
            yield cls(device=resolve_device(device))
            return
        dist.init_process_group("gloo", timeout=timeout)
        try:
            yield cls("none", local_device(device), dist.get_rank(), world_size)
        finally:
            dist.destroy_process_group()

    @classmethod
    def current(cls) -> "Distributed":
        """The processes of torch.distributed, else a single one; all processes call it together."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        group = cls(rank=dist.get_rank(), world_size=dist.get_world_size())
        group.control = dist.new_group(backend="gloo")
        return group

    @property
    def replicas(self) -> Any:
        """Process group of the ranks that hold the same parameters; None if there are no replicas."""
        if self.mode == "ddp":
            return dist.group.WORLD
        return self.mesh["replicate"].get_group() if self.mode == "hsdp" else None

    def wrap(self, model: nn.Module, precision: str, averaged: bool = True) -> None:
        """Wraps the model in DDP or FSDP2, before optimizers are built; parameter names do not change.

        fsdp and hsdp gather layers in 16 bit under bf16 and fp16, as autocast would cast them, and norms,
        embeddings and outputs in fp32 (appendix D, guideline 2). Gradients are averaged in fp32.

        Args:
            model: the same weights in every process.
            precision: fp32, bf16 or fp16.
            averaged: whether replicas average their gradients here; else PowerSGD does.
        """
        self.averaged = averaged
        if self.mode == "ddp":
            proxy = ForwardProxy(model)
            self.wrapped = DistributedDataParallel(proxy, **{BUFFERS_OPTION: False}) if averaged else proxy
        elif self.sharded:
            self._scalars = [p for p in model.parameters() if p.ndim == 0]  # FSDP2 does not shard scalars
            mesh = self.mesh if averaged else self.mesh["shard"]
            self.wrapped = shard_model(model, mesh, precision, self._scalars, by_longer_side=not averaged)

    def forward(self, model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
        """function(model, *args) as the forward pass that DDP and FSDP hook, whatever methods it calls."""
        return self.wrapped(function, *args) if self.wrapped else function(model, *args)

    def reshard(self) -> None:
        """Frees parameters left gathered by a pass without gradients."""
        if self.sharded:
            self.wrapped.reshard()

    def shard_of(self, number: int, passes: int, num_targets: Tensor | None) -> BatchShard:
        """The shard of a step's batch in pass `number` of `passes` of this process."""
        if self.world_size == 1:
            return BatchShard(number, passes, num_targets)
        index, count = self.rank * passes + number, self.world_size * passes
        return BatchShard(index, count, num_targets, self.all_reduce, self.gather)

    @contextmanager
    def no_sync(self, active: bool) -> Iterator[None]:
        """Context of a pass whose gradients accumulate (`active`): what can wait for the last pass does.

        ddp averages in the last pass only. fsdp reduces in each, else every process would hold all gradients;
        hsdp reduces within a node in each and averages between nodes in the last.
        """
        if self.mode == "ddp" and self.averaged and active:
            with self.wrapped.no_sync():
                yield
            return
        if self.mode == "hsdp" and self.averaged:
            self.wrapped.set_requires_all_reduce(not active)
        yield

    def finish_gradients(self, model: nn.Module, passes: int) -> None:
        """Divides gradients by the passes, and averages those of scalars, which FSDP2 leaves alone."""
        for scalar in self._scalars:
            if scalar.grad is not None:
                scalar.grad = self.all_reduce(scalar.grad) / self.world_size
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        if passes > 1 and gradients:
            torch._foreach_div_(gradients, passes)

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Sum (or another reduction) over the processes, without gradient; as all collectives, identity for
        one."""
        if self.world_size == 1:
            return tensor.detach()
        result = tensor.detach().clone()
        dist.all_reduce(result, op)
        return result

    def all_true(self, flags: Tensor) -> Tensor:
        """bool: true where the flag is true in every process."""
        return self.all_reduce(flags.int(), dist.ReduceOp.MIN).bool()

    def gather(self, rows: Tensor) -> Tensor:
        """(B, ...) of each process -> (world_size * B, ...) in rank order; gradients flow back to each."""
        return _Gather.apply(rows)

    def max(self, value: int) -> int:
        """The largest value of any process."""
        if self.world_size == 1:
            return value
        result = torch.tensor(value)
        dist.all_reduce(result, dist.ReduceOp.MAX, self.control)
        return int(result)

    def gather_objects(self, value: T) -> list[T]:
        """The value of every process, in rank order."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, self.control)
        return values

    def gather_results(self, function: Callable[[], T]) -> list[T]:
        """What the function returns in each process; an error in one is raised in all, after all have called
        it."""
        outcome: tuple[Any, Exception | None]
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, error
        outcomes = self.gather_objects(outcome)
        if error := outcome[1] or next((error for _, error in outcomes if error), None):
            raise error
        return [result for result, _ in outcomes]

    def on_main(self, function: Callable[[], T]) -> T:
        """Calls the function on rank 0; its result, or its error, is every process's."""
        return self.gather_results(lambda: function() if self.is_main else None)[0]

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def __enter__(self) -> "Distributed":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.control is not None and isinstance(error, RuntimeError) and "timed out" in str(error).lower():
            try:
                dist.monitored_barrier(self.control, MONITOR_TIMEOUT, wait_all_ranks=True)
            except RuntimeError as missing:
                error.add_note(f"A process hangs or has ended: {missing}")
        if sys.stdout is not self._stdout:
            sys.stdout.close()
            sys.stdout = self._stdout
        if (self.world_size > 1 or self.mode != "none") and dist.is_initialized():
            dist.destroy_process_group()


BUFFERS_OPTION = next(  # renamed in torch 2.15
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


class _Gather(torch.autograd.Function):
    """All-gather with gradient: a row's gradient is the sum over all processes."""

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


def _check_launch(mode: Mode, shard: int | None) -> int:
    """The number of processes; ValueError if mode and launch do not match."""
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
    if shard is not None and mode != "hsdp":
        raise ValueError(f"--shard is for --parallel hsdp, not for {mode}; omit it")
    if mode == "none" and world_size > 1:
        raise ValueError(
            f"torchrun started {world_size} processes, and with --parallel none each would train alone; "
            "add --parallel ddp, fsdp or hsdp, or start it without torchrun"
        )
    if mode != "none" and not launched:
        raise ValueError(
            f"--parallel {mode} needs torchrun: torchrun --nproc-per-node 2 SCRIPT ... --parallel {mode}"
        )
    if mode == "hsdp":
        size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if shard is None else shard
        if size < 1 or world_size % size:
            raise ValueError(
                f"{world_size} processes do not divide into groups of {size} that share parameters; "
                "set --shard to a divisor, or start as many processes on each machine"
            )
    return world_size

"""Data-parallel training (Section 2.5): DDP, FSDP2 and hybrid sharding over PyTorch's DeviceMesh.

    none   one process
    ddp    each process holds the whole model; gradients are averaged
    fsdp   each process holds a shard of every parameter, gradient and moment; layers are gathered as needed
    hsdp   shards among the processes of a machine, replicas between machines, as in the paper

Each process takes its shard of a batch; loss, gradient and update equal a single process's up to rounding.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dalle.meta_device import build_in_slices
from dalle.train.config import TIMEOUT_MINUTES, Mode
from dalle.train.fsdp import ForwardProxy, assign_slices, local_slice, shard_model
from dalle.train.precision import local_device, resolve_device

T = TypeVar("T")
MONITOR_TIMEOUT = timedelta(seconds=20)  # to answer when another process has timed out


class Distributed(AbstractContextManager):
    """This process among those that work together; `Distributed()` is a single process.

    Attributes:
        mesh: DeviceMesh, ("shard",) for fsdp and ("replicate", "shard") for hsdp, else None.
        wrapped: the DDP or FSDP module made by `wrap`; None in a single process.
        control: gloo group for small messages on the CPU; None is the default group.
    """

    def __init__(
        self, mode: Mode = "none", device: torch.device | None = None, rank: int = 0, world_size: int = 1
    ):
        self.mode, self.rank, self.world_size = mode, rank, world_size
        self.device = device or torch.device("cpu")
        self.mesh: Any = None
        self.wrapped: Any = None
        self.control: Any = None
        self.is_main = rank == 0  # writes and prints for all
        self.sharded = mode in ("fsdp", "hsdp")  # each process holds shards of the parameters
        self.averaged = True
        self._model: nn.Module | None = None  # that is wrapped
        self._scalars: list[nn.Parameter] = []  # FSDP2 does not shard them
        self._slices: dict[str, Tensor] = {}  # first values, until the model is wrapped
        self._stdout = sys.stdout

    @classmethod
    def start(
        cls, mode: Mode, device: str, shard: int | None = None, timeout_minutes: float = TIMEOUT_MINUTES
    ) -> "Distributed":
        """Joins the processes that torchrun started for a training; mode "none" is a single process.

        Only rank 0 prints from then on. A process that waits longer than the timeout ends with an error that
        names the ranks that do not answer (over NCCL the watchdog names the collective). With hsdp `shard`
        processes share one set of parameters, by default those of a machine.
        """
        if mode == "none":
            return cls(device=resolve_device(device))
        own = local_device(device)
        if own.type == "cuda":
            torch.cuda.set_device(own)
        backend = "nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
        world_size = dist.get_world_size()
        group = cls(mode, own, dist.get_rank(), world_size)
        group.control = dist.new_group(backend="gloo")
        if group.sharded:
            from torch.distributed.device_mesh import init_device_mesh  # takes seconds to import

            shard = shard or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            dims = {"replicate": world_size // shard, "shard": shard}
            dims = dims if mode == "hsdp" else {"shard": world_size}
            group.mesh = init_device_mesh(own.type, tuple(dims.values()), mesh_dim_names=tuple(dims))
        if not group.is_main:
            sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115 - `__exit__` closes it
        return group

    @classmethod
    @contextmanager
    def join(cls, device: str) -> Iterator["Distributed"]:
        """Context of the processes that divide work, as sampling; a single one without torchrun."""
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if world_size == 1:
            yield cls(device=resolve_device(device))
            return
        dist.init_process_group("gloo", timeout=timedelta(days=7))
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

    def build(self, make: Callable[[], nn.Module], averaged: bool = True) -> nn.Module:
        """The model of `make()` with the same first values, for `wrap` with the same `averaged`.

        A shard keeps its slice of each parameter as it is initialized, and a device other than the CPU the
        whole; no process has all of them in memory, and parameters are on the meta device until `wrap`.
        """
        if not self.sharded and self.device.type == "cpu":
            return make()
        if self.sharded:
            model, self._slices = build_in_slices(
                make, lambda whole: local_slice(whole, self.mesh["shard"], by_longer_side=not averaged)
            )
            return model
        model, values = build_in_slices(make, lambda whole: whole.to(self.device, copy=True))
        model.load_state_dict(values, strict=False, assign=True)
        return model.to(self.device)

    def wrap(self, model: nn.Module, precision: str, averaged: bool = True) -> None:
        """Wraps the model in DDP or FSDP2, before optimizers are built; parameter names do not change.

        Does nothing for a model that is wrapped.

        fsdp and hsdp gather layers in 16 bit under bf16 and fp16, as autocast would cast them, and norms,
        embeddings and outputs in fp32 (appendix D, guideline 2). Gradients are averaged in fp32: here if
        `averaged`, else by PowerSGD.
        """
        if self._model is model:
            return
        self._model, self.averaged = model, averaged
        if self.mode == "ddp":
            self.wrapped = ForwardProxy(model)
            if averaged:
                renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
                option = "forward_sync_buffers" if renamed else "broadcast_buffers"  # before torch 2.15
                options = {"gradient_as_bucket_view": True, option: False}
                self.wrapped = DistributedDataParallel(self.wrapped, **options)
        elif self.sharded:
            self._scalars = [p for p in model.parameters() if p.ndim == 0]
            mesh = self.mesh if averaged else self.mesh["shard"]
            self.wrapped = shard_model(model, mesh, precision, self._scalars, by_longer_side=not averaged)
            assign_slices(model, self._slices)
            self._slices = {}

    def forward(self, model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
        """function(model, *args) as the forward pass that DDP and FSDP hook, whatever methods it calls."""
        return self.wrapped(function, *args) if self.wrapped else function(model, *args)

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
        """Sum or another reduction, without gradient; as all collectives, the identity for one process."""
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
        return _Gather.apply(rows) if self.world_size > 1 else rows

    def max(self, value: int) -> int:
        """The largest value of any process, by a message on the CPU."""
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
        """What the function returns in each process; an error in one is raised in all, after all calls."""
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

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.control is not None and isinstance(error, RuntimeError) and "timed out" in str(error).lower():
            try:
                dist.monitored_barrier(self.control, MONITOR_TIMEOUT, wait_all_ranks=True)
            except RuntimeError as missing:
                error.add_note(f"A process hangs or has ended: {missing}")
        if sys.stdout is not self._stdout:
            sys.stdout.close()
            sys.stdout = self._stdout
        if self.mode != "none":
            dist.destroy_process_group()


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


class _Gather(torch.autograd.Function):
    """All-gather with gradient: a row's gradient is the sum over all processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own

"""PowerSGD (section 2.5, appendix E; Vogels et al. 2019): gradients cross the slow link as two thin factors.

Replicas must average their gradients. Instead of a matrix G (m, n) each sends P (m, r) and Q' (n, r):

    E <- E + G            the error buffer: what earlier updates left unsent
    P  = mean of E Q      Q (n, r) Gaussian, drawn once and kept
    P <- orthonormal columns that span P
    Q' = mean of E^T P
    P Q'^T                is taken for the mean gradient; E <- E - P Q'^T stays for the next update

so that all that was taken and the mean of E together are always the sum of the mean gradients. Only the
matrices of the layers are factored; embeddings, outputs, gains and biases are averaged whole in fp32.

A plain function on gradients, called after the backward pass, rather than torch's communication hook: that
one updates Q or redraws it each step (`warm_start`), factors whatever is large, embeddings too, keeps its
errors by the numbers of DDP's buckets, which no checkpoint can carry to another number of processes, and
does not know FSDP2. A test holds this against torch's with its Q put back. The same function serves
replicas (ddp) and the replicas of shards (hsdp): each process factors the gradient of its own shard. What
is lost is the overlap of sending with the backward pass.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle.io.rng import generator
from dalle.train.config import PowerSGDConfig
from dalle.train.dtensor import local
from dalle.train.float_formats import MEAN, rounded
from dalle.train.optimizer import hidden_matrices

EPS = 1e-6  # E.2, step 5


def build_powersgd(
    model: nn.Module, config: PowerSGDConfig, seed: int, group: Any = None
) -> "PowerSGD | None":
    """PowerSGD over a model's trainable parameters, or None where no rank is given or there is one replica
    only.

    Args:
        model: bare, or with its parameters sharded over a one-dimensional mesh (FSDP2).
        config: rank and the rest.
        seed: of Q.
        group: the processes that hold the same parameters (the same shards of them); all unless given.
    """
    if (
        config.rank is None
        or not (dist.is_available() and dist.is_initialized())
        or dist.get_world_size(group) == 1
    ):
        return None
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return PowerSGD(parameters, stacked_matrices(model), config, seed, group)


@dataclass
class Factored:
    """One parameter whose gradient is factored."""

    error: Tensor
    """E, the shape of the parameter's shard on this process."""
    ranks: list[int]
    """r of each matrix in it."""
    qs: list[Tensor] = field(default_factory=list)
    """Q of each, (n, r)."""

    def matrices(self, shard: Tensor) -> list[Tensor]:
        """The matrices in a tensor of the parameter's shape as views, each (m, n) with m <= n (E.2)."""
        parts = shard.tensor_split(len(self.ranks))
        return [part if part.shape[0] <= part.shape[1] else part.T for part in parts]


class PowerSGD:
    """Averages gradients over replicas, those of the layers' matrices by factors.

    Every process of every replica calls `reduce` and `state_dict` at the same time as the others: both send.

    Args:
        parameters: name -> parameter, whole or sharded over a one-dimensional mesh.
        matrices: name -> how many matrices are stacked in it; all others are averaged whole.
        config: rank and the rest; its rank is of all shards together.
        seed: of Q.
        group: the replicas; all processes unless given.

    Raises:
        ValueError: no rank; parameters on a mesh of two dimensions, which FSDP2 averages by itself; shards
            with a Q that changes.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        matrices: dict[str, int],
        config: PowerSGDConfig,
        seed: int = 0,
        group: Any = None,
    ):
        if config.rank is None:
            raise ValueError("PowerSGD needs a rank, got None; Table 1 has 512, 640 and 896")
        self.parameters, self.config, self.seed, self.group = parameters, config, seed, group
        self.sent = 0
        """Bytes that this process gave to the averaging of the last update."""
        self.factored: dict[str, Factored] = {}
        for name in (name for name in parameters if name in matrices):  # in the same order everywhere
            shard = local(parameters[name]).detach()
            shards = _place(parameters[name])[1]
            if shards > 1 and config.q_mode == "warm_start":
                raise ValueError(
                    "a checkpoint cannot carry the Q of each shard; set powersgd.q_mode to fixed or random"
                )
            even = (
                shard.numel() * shards == parameters[name].numel()
            )  # else shards would not agree, and some are empty
            ranks = plan_ranks(shard.shape, matrices[name], math.ceil(config.rank / shards)) if even else None
            if ranks:
                self.factored[name] = Factored(torch.zeros_like(shard, dtype=torch.float32), ranks)
                self._draw(name, 0)

    def traffic(self) -> dict[str, float]:
        """Of the last update, for the log: MB that this process gave to the averaging, and the share of those
        of the same gradients whole in fp32."""
        whole = sum(4 * local(p).numel() for p in self.parameters.values())
        return {"comm_mb": self.sent / 1e6, "comm_ratio": self.sent / whole}

    @torch.no_grad()
    def reduce(self, step: int) -> None:
        """Puts (what is taken for) the mean over the replicas into every gradient.

        If any gradient on any process is not finite, the update is to be skipped: those gradients become Inf
        everywhere, and no error buffer changes. Parameters without a gradient are left out; they must be the
        same ones on all processes.

        Args:
            step: the update, counted from 0.
        """
        self.sent = 0
        gradients = {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        if self._spoilt(gradients):
            return
        names = (
            [name for name in self.factored if name in gradients] if step >= self.config.start_step else []
        )
        self._average([gradient for name, gradient in gradients.items() if name not in names])
        if names:
            self._factor({name: gradients[name] for name in names}, step)

    def _spoilt(self, gradients: dict[str, Tensor]) -> bool:
        """Whether any process has Inf or NaN; the gradients concerned are then Inf on all of them."""
        if not gradients:
            return False
        finite = self.share(torch.stack([g.isfinite().all() for g in gradients.values()]))
        if finite.all():
            return False
        for gradient, good in zip(gradients.values(), finite.tolist(), strict=True):
            if not good:
                gradient.fill_(torch.inf)
        return True

    def share(self, finite: Tensor) -> Tensor:
        """Flags, of which each becomes false if it is so on any process of any replica (E.2, step 10)."""
        flags = finite.int()
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        return flags.bool()

    def _factor(self, gradients: dict[str, Tensor], step: int) -> None:
        """The algorithm above, on all matrices at once."""
        held = {name: self.factored[name] for name in gradients}
        paper = self.config.message_dtype == "paper"
        for name, one in held.items():
            if self.config.q_mode == "random":
                self._draw(name, step)
            one.error.add_(gradients[name])
            self._keep(one.error)
        matrices = [matrix for one in held.values() for matrix in one.matrices(one.error)]
        ps = [e @ q for e, q in zip(matrices, [q for one in held.values() for q in one.qs], strict=True)]
        good = self._average(ps, paper)
        ps = [orthonormal(p.nan_to_num(0, 0, 0)) for p in ps]
        ps = [rounded(p, MEAN) for p in ps] if paper else ps
        qs = [e.T @ p for e, p in zip(matrices, ps, strict=True)]
        good = good & self._average(qs, paper)
        if not self._all_good(held, gradients, good):
            return
        taken = [matrix for name, one in held.items() for matrix in one.matrices(gradients[name])]
        for gradient, p, q in zip(taken, ps, qs, strict=True):
            gradient.copy_(p @ q.T)
        for name, one in held.items():
            one.error.sub_(gradients[name])
            self._keep(one.error)
            if self.config.q_mode == "warm_start":
                one.qs = [orthonormal(qs.pop(0)).contiguous() for _ in one.qs]  # as a checkpoint gives it

    def _all_good(self, held: dict[str, Factored], gradients: dict[str, Tensor], sent: Tensor) -> bool:
        """Whether all buffers and messages were finite. If not, nothing was taken, so buffers keep what is
        owed, but those that are not finite start again from 0 (E.2, step 12)."""
        buffers = torch.stack([one.error.isfinite().all() for one in held.values()])
        if self.share(buffers.all() & sent):
            return True
        for one, good in zip(held.values(), buffers.tolist(), strict=True):
            if not good:
                one.error.zero_()
        for gradient in gradients.values():
            gradient.fill_(torch.inf)
        return False

    def _average(self, tensors: list[Tensor], paper: bool = False) -> Tensor:
        """The mean over the replicas, in place, in one message. Whether the message was finite at both
        ends."""
        if not tensors:
            return torch.tensor(True)
        message = torch.cat([t.flatten() for t in tensors]).float()
        self.sent += message.numel() * (2 if paper else 4)
        good = message.isfinite().all()
        message = self._mean(rounded(message, MEAN, saturate=True) if paper else message)
        good = good & message.isfinite().all()
        message = rounded(message, MEAN, saturate=True) if paper else message
        for tensor, mean in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))
        return good

    def _mean(self, message: Tensor) -> Tensor:
        """The mean over the replicas, in place."""
        dist.all_reduce(message, group=self.group)
        return message.div_(dist.get_world_size(self.group))

    def _keep(self, error: Tensor) -> None:
        """Rounds a buffer to its format."""
        if self.config.message_dtype == "paper":
            error.copy_(rounded(error, MEAN))

    def _draw(self, name: str, step: int) -> None:
        """Q of each matrix in a parameter: Gaussian, the same on all replicas of a shard."""
        one = self.factored[name]
        place = _place(self.parameters[name])[0]
        draws = generator("powersgd", self.seed, step, place, name)
        widths = [matrix.shape[1] for matrix in one.matrices(one.error)]
        one.qs = [
            torch.tensor(draws.standard_normal((n, r), dtype="float32"), device=one.error.device)
            for n, r in zip(widths, one.ranks, strict=True)
        ]

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The mean of the replicas' error buffers, and Q if it changes.

        Only the mean acts on training, so a checkpoint of it serves any number of replicas (E.2). Each
        replica goes on from the mean too, so that going on and resuming are the same to the last bit.
        """
        for one in self.factored.values():
            self._mean(one.error)
            self._keep(one.error)
        errors = {f"error/{name}": self._like(name, one.error) for name, one in self.factored.items()}
        return errors | self._changing_qs()

    def _changing_qs(self) -> dict[str, Tensor]:
        if self.config.q_mode != "warm_start":
            return {}
        return {f"q/{name}/{i}": q for name, one in self.factored.items() for i, q in enumerate(one.qs)}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Takes them up on every replica; ValueError for those of other parameters.

        Another number of shards may factor other parameters: what is owed to one that is sent whole now is
            dropped,
        and one that is new owes nothing.
        """
        own = {f"error/{name}": one.error for name, one in self.factored.items()} | self._changing_qs()
        wrong = sorted(tensors.keys() - own.keys() - {f"error/{name}" for name in self.parameters})
        if wrong or (own and not own.keys() & tensors.keys()):
            raise ValueError(
                f"the saved errors of PowerSGD are of another model or rank, first {[*wrong, *own][0]!r}"
            )
        tensors = {name: tensor for name, tensor in tensors.items() if name in own}
        for name, tensor in tensors.items():
            if local(tensor).shape != own[name].shape:
                shapes = f"{tuple(local(tensor).shape)}, expected {tuple(own[name].shape)}"
                raise ValueError(f"the saved errors of PowerSGD do not fit: {name!r} is {shapes}")
            own[name].copy_(local(tensor))

    def _like(self, name: str, shard: Tensor) -> Tensor:
        """This process's shard as a tensor sharded as its parameter is."""
        parameter = self.parameters[name]
        if not hasattr(parameter, "device_mesh"):
            return shard
        layout = {"shape": parameter.shape, "stride": parameter.stride()}
        return type(parameter.data).from_local(shard, parameter.device_mesh, parameter.placements, **layout)


def _place(parameter: Tensor) -> tuple[int, int]:
    """(which shard of a parameter this process holds, of how many)."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return 0, 1
    if mesh.ndim != 1:
        raise ValueError(f"PowerSGD needs parameters sharded over a mesh of one dimension, got {mesh.ndim}")
    return mesh.get_local_rank(), mesh.size()


def orthonormal(p: Tensor) -> Tensor:
    """(m, r) -> orthonormal columns with the same span, by Householder reflections (E.2, step 5).

    The paper adds eps I to P as its constants scale it; here eps is relative to the largest entry.
    """
    shifted = p.clone()
    shifted.diagonal().add_(EPS * p.abs().max())
    return torch.linalg.qr(shifted)[0]


def stacked_matrices(model: nn.Module) -> dict[str, int]:
    """Names of the layers' matrices, and how many each parameter holds one below the other.

    Queries, keys and values have a matrix each in the paper; here they share a parameter.
    """
    return {
        name: 3 if name.endswith(("qkv.weight", "in_proj_weight")) else 1
        for name, _ in hidden_matrices(model)
    }


def plan_ranks(shape: tuple[int, ...], stacked: int, rank: int) -> list[int] | None:
    """The rank of each of the matrices stacked in a shard; None where the factors would be no smaller.

    Args:
        shape: (rows, columns) of the shard.
        stacked: matrices one below the other.
        rank: of one shard.
    """
    heights = [len(part) for part in torch.empty(shape[0], device="meta").tensor_split(stacked)]
    if any(rank * (height + shape[1]) >= height * shape[1] for height in heights):
        return None
    return [rank] * stacked

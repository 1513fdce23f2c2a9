"""PowerSGD gradient compression between replicas (section 2.5, appendix E; Vogels et al. 2019).

Instead of a gradient G (m, n) each replica sends two thin factors, P (m, r) and Q' (n, r):

    E <- E + G            error buffer: what earlier steps left unsent
    P  = mean of E Q      Q (n, r) Gaussian, sampled once and kept
    P <- orthonormal columns that span P
    Q' = mean of E^T P
    G <- P Q'^T           in place of the mean gradient
    E <- E - P Q'^T

Only matrices of the layers are factored; other gradients are averaged whole in fp32. torch's communication
hook is not used: it changes Q in each step, factors embeddings, keeps errors by DDP bucket, which no
checkpoint can carry to another number of processes, and does not know FSDP2. With hsdp each process factors
the gradient of its own shard. Communication does not overlap with the backward pass.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle.sampling import generator
from dalle.train.config import PowerSGDConfig
from dalle.train.distributed import is_dtensor, local
from dalle.train.float_formats import MEAN, rounded
from dalle.train.optimizer import hidden_matrices

EPS = 1e-6  # E.2, step 5


def build_powersgd(
    model: nn.Module, config: PowerSGDConfig, seed: int, group: Any = None
) -> "PowerSGD | None":
    """PowerSGD over a model's trainable parameters; None without a rank or with one replica."""
    joined = dist.is_available() and dist.is_initialized()
    if config.rank is None or not joined or dist.get_world_size(group) == 1:
        return None
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return PowerSGD(parameters, stacked_matrices(model), config, seed, group)


@dataclass
class FactoredParameter:
    """The state of a parameter whose gradient is factored."""

    error: Tensor
    """E, the shape of the parameter's shard on this process."""
    stacked: int
    """Matrices stacked in it."""
    rank: int
    """r of each matrix."""
    qs: list[Tensor] = field(default_factory=list)
    """Q of each, (n, r)."""

    def matrices(self, shard: Tensor) -> list[Tensor]:
        """The matrices in a tensor of the parameter's shape as views, each (m, n) with m <= n (E.2)."""
        parts = shard.tensor_split(self.stacked)
        return [part if part.shape[0] <= part.shape[1] else part.T for part in parts]


class PowerSGD:
    """Averages gradients over replicas, those of the layers' matrices by factors.

    All processes of all replicas call `reduce` and `state_dict` together.

    Args:
        parameters: by name, whole or sharded over a one-dimensional mesh.
        matrices: name -> number of matrices stacked in it; other parameters are averaged whole.
        config: its rank is that of all shards together.
        seed: of Q.
        group: the replicas: processes that hold the same (shards of) parameters; default: all.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        matrices: dict[str, int],
        config: PowerSGDConfig,
        seed: int = 0,
        group: Any = None,
    ):
        self.parameters, self.config, self.seed, self.group = parameters, config, seed, group
        self.sent = 0  # bytes in the last step
        self.factored: dict[str, FactoredParameter] = {}
        for name in (name for name in parameters if name in matrices):  # in the same order everywhere
            shard = local(parameters[name]).detach()
            shards = _place(parameters[name])[1]
            if shards > 1 and config.q_mode == "warm_start":
                raise ValueError("a checkpoint lacks the Q of each shard; set q_mode to fixed or random")
            rank = math.ceil(config.rank / shards)
            even = shard.numel() * shards == parameters[name].numel()
            if even and factors_are_smaller(shard.shape, matrices[name], rank):
                error = torch.zeros_like(shard, dtype=torch.float32)
                self.factored[name] = FactoredParameter(error, matrices[name], rank)
                self._sample_q(name, 0)

    def traffic(self) -> dict[str, float]:
        """MB that this process sent in the last step, and as a fraction of full fp32 gradients."""
        full = sum(4 * local(p).numel() for p in self.parameters.values())
        return {"comm_mb": self.sent / 1e6, "comm_ratio": self.sent / full}

    @torch.no_grad()
    def reduce(self, step: int) -> None:
        """Replaces every gradient by (an approximation of) its mean over the replicas.

        If any gradient is not finite on any process, it becomes Inf everywhere, so that the step is skipped,
        and no error buffer changes. Parameters without a gradient must be the same ones on all processes.
        """
        self.sent = 0
        gradients = {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        flags = self.all_true(torch.stack([g.isfinite().all() for g in gradients.values()]))
        finite = dict(zip(gradients, flags.unbind(), strict=True))
        for name, gradient in gradients.items():
            gradient.masked_fill_(~finite[name], torch.inf)
        started = step >= self.config.start_step
        held = {name: one for name, one in self.factored.items() if name in gradients and started}
        if whole := [gradient for name, gradient in gradients.items() if name not in held]:
            self._average(whole)
        if held:
            self._factor(held, gradients, step, flags.all())

    def all_true(self, flags: Tensor) -> Tensor:
        """bool: true where the flag is true on all processes of all replicas (E.2, step 10)."""
        flags = flags.int()
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        return flags.bool()

    def _factor(
        self, held: dict[str, FactoredParameter], gradients: dict[str, Tensor], step: int, finite: Tensor
    ) -> None:
        """The algorithm above, for all matrices at once; without effect unless the gradients are `finite`.

        If a buffer or message is not finite, the step is skipped and such buffers restart from 0 (E.2, step
        12). All this is decided on the device.
        """
        paper = self.config.message_dtype == "paper"
        for name, one in held.items():
            if self.config.q_mode == "random":
                self._sample_q(name, step)
            one.error.add_(gradients[name].masked_fill(~finite, 0.0))
            self._keep(one.error)
        matrices = [matrix for one in held.values() for matrix in one.matrices(one.error)]
        ps = [e @ q for e, q in zip(matrices, [q for one in held.values() for q in one.qs], strict=True)]
        good = self._average(ps, paper)
        ps = all_orthonormal([p.nan_to_num(0, 0, 0) for p in ps])
        ps = [rounded(p, MEAN) for p in ps] if paper else ps
        qs = [e.T @ p for e, p in zip(matrices, ps, strict=True)]
        good = good & self._average(qs, paper)
        here = torch.stack([one.error.isfinite().all() for one in held.values()])
        good = self.all_true(here.all() & good)
        made, failed = finite & good, finite & ~good
        taken = [matrix for name, one in held.items() for matrix in one.matrices(gradients[name])]
        for gradient, p, q in zip(taken, ps, qs, strict=True):
            gradient.copy_(torch.where(made, p @ q.T, gradient))
        for (name, one), kept in zip(held.items(), here, strict=True):
            one.error.sub_(gradients[name].masked_fill(~made, 0.0)).masked_fill_(~kept, 0.0)
            gradients[name].masked_fill_(failed, torch.inf)
            self._keep(one.error)
            if self.config.q_mode == "warm_start":
                new = all_orthonormal([qs.pop(0).nan_to_num(0, 0, 0) for _ in one.qs])
                one.qs = [torch.where(made, q, old).contiguous() for q, old in zip(new, one.qs, strict=True)]

    def _average(self, tensors: list[Tensor], paper: bool = False) -> Tensor:
        """Averages tensors over the replicas in place, in one message; returns whether it was finite."""
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
        if self.config.message_dtype == "paper":
            error.copy_(rounded(error, MEAN))

    def _sample_q(self, name: str, step: int) -> None:
        """Samples Q of each matrix in a parameter, the same on all replicas of a shard."""
        one = self.factored[name]
        rng = generator("powersgd", self.seed, step, _place(self.parameters[name])[0], name)
        one.qs = [
            torch.tensor(rng.standard_normal((matrix.shape[1], one.rank), "float32"), device=matrix.device)
            for matrix in one.matrices(one.error)
        ]

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The mean of the replicas' error buffers, and Q if it changes.

        Only the mean acts on training, so it serves any number of replicas (E.2). Each replica continues from
        the mean too, so that continuing and resuming are bit-exact.
        """
        errors = {}
        for name, one in self.factored.items():
            self._mean(one.error)
            self._keep(one.error)
            errors[f"error/{name}"] = _sharded_like(one.error, self.parameters[name])
        return errors | self._changing_qs()

    def _changing_qs(self) -> dict[str, Tensor]:
        if self.config.q_mode != "warm_start":
            return {}
        return {f"q/{name}/{i}": q for name, one in self.factored.items() for i, q in enumerate(one.qs)}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Loads them on every replica; ValueError for those of other parameters.

        Another number of shards may factor other parameters: errors of one now sent whole are dropped, those
        of a new one start at 0.
        """
        own = {f"error/{name}": one.error for name, one in self.factored.items()} | self._changing_qs()
        wrong = sorted(tensors.keys() - own.keys() - {f"error/{name}" for name in self.parameters})
        wrong += [name for name in own if name in tensors and local(tensors[name]).shape != own[name].shape]
        if wrong or (own and not own.keys() & tensors.keys()):
            raise ValueError(f"PowerSGD's errors are of another model or rank, first {[*wrong, *own][0]!r}")
        for name in own.keys() & tensors.keys():
            own[name].copy_(local(tensors[name]))


def _sharded_like(shard: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard as a DTensor like its parameter."""
    if not is_dtensor(parameter):
        return shard
    layout = {"shape": parameter.shape, "stride": parameter.stride()}
    return type(parameter.data).from_local(shard, parameter.device_mesh, parameter.placements, **layout)


def _place(parameter: Tensor) -> tuple[int, int]:
    """Index of this process's shard of a parameter, and the number of shards."""
    if not is_dtensor(parameter):
        return 0, 1
    mesh = parameter.device_mesh
    if mesh.ndim != 1:
        raise ValueError(f"PowerSGD needs parameters sharded over a mesh of one dimension, got {mesh.ndim}")
    return mesh.get_local_rank(), mesh.size()


def all_orthonormal(ps: list[Tensor]) -> list[Tensor]:
    """`orthonormal` of each, those of one shape in a single call."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, p in enumerate(ps):
        by_shape.setdefault(p.shape, []).append(i)
    found = {}
    for same in by_shape.values():
        found |= dict(zip(same, orthonormal(torch.stack([ps[i] for i in same])), strict=True))
    return [found[i] for i in range(len(ps))]


def orthonormal(p: Tensor) -> Tensor:
    """(..., m, r) -> orthonormal columns of the same span (E.2, step 5); eps is relative to the largest
    entry."""
    shifted = p.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(EPS * p.abs().amax((-2, -1))[..., None])
    return torch.linalg.qr(shifted)[0]


def stacked_matrices(model: nn.Module) -> dict[str, int]:
    """Names of the layers' matrices -> how many are stacked: queries, keys and values share a parameter."""
    names = [name for name, _ in hidden_matrices(model)]
    return {name: 3 if name.endswith(("qkv.weight", "in_proj_weight")) else 1 for name in names}


def factors_are_smaller(shape: tuple[int, ...], stacked: int, rank: int) -> bool:
    """Whether the factors of each of the matrices stacked in a shard (rows, columns) are smaller than it."""
    heights = [len(part) for part in torch.empty(shape[0], device="meta").tensor_split(stacked)]
    return all(rank * (height + shape[1]) < height * shape[1] for height in heights)

"""Checks of PowerSGD that each of several processes runs: functions that assert."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle.train.config import PowerSGDConfig
from dalle.train.float_formats import MEAN, rounded
from dalle.train.powersgd import PowerSGD, build_powersgd
from tests.helpers.host_waits import HostWaits
from tests.helpers.processes import traceback_of

SHAPES = {"wide": (12, 20), "tall": (24, 12), "qkv.weight": (36, 12), "table": (30, 12), "gain": (12,)}
MATRICES = {"wide": 1, "tall": 1, "qkv.weight": 3}
SETTINGS = ({"q_mode": "fixed"}, {"q_mode": "warm_start"}, {"q_mode": "random"}, {"message_dtype": "paper"})


def parameters() -> dict[str, Tensor]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}


def averager(**settings) -> PowerSGD:
    return PowerSGD(parameters(), MATRICES, PowerSGDConfig(**{"rank": 3} | settings), seed=7)


def give(averager: PowerSGD, step: int, low: bool = False) -> dict[str, Tensor]:
    """Puts this process's gradients of a step in place, matrices of rank 1 if `low`, and returns copies."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    for p in averager.parameters.values():
        p.grad = torch.randn(p.shape, generator=generator)
        if low and p.ndim == 2:
            p.grad = p.grad[:, :1] @ p.grad[:1]
    return {name: p.grad.clone() for name, p in averager.parameters.items()}


def step(averager: PowerSGD, number: int, low: bool = False) -> dict[str, Tensor]:
    """Averages the gradients of a step in place; this process's own, as they were."""
    own = give(averager, number, low)
    averager.reduce(number)
    return own


def mean(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def same_everywhere(tensor: Tensor) -> bool:
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.contiguous())
    return all(torch.equal(copy, tensor) for copy in copies)


def gradients(averager: PowerSGD) -> dict[str, Tensor]:
    return {name: p.grad for name, p in averager.parameters.items()}


def check_exact_where_the_gradients_have_no_higher_rank_and_before_the_start() -> None:
    powersgd, late = averager(), averager(start_step=1)
    own = step(powersgd, 0, low=True)  # rank 1 each, 2 together
    for name, gradient in gradients(powersgd).items():
        torch.testing.assert_close(gradient, mean(own[name]), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(own[name], mean(own[name]), atol=0.1)
        assert name in MATRICES or torch.equal(gradient, mean(own[name]))  # a plain all-reduce
    assert powersgd.factored.keys() == MATRICES.keys()
    for number in (0, 1):
        own = step(late, number)
        assert torch.equal(late.parameters["wide"].grad, mean(own["wide"])) == (number == 0)


def check_what_was_taken_and_the_errors_are_the_sum_of_the_mean_gradients() -> None:
    """In the paper's formats up to rounding. Q is kept, updated or sampled again, alike on all replicas."""
    for settings in SETTINGS:
        powersgd, paper, qs = averager(**settings), "message_dtype" in settings, []
        taken, true = ({name: torch.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
        for number in range(5):
            own = step(powersgd, number)
            for name, gradient in gradients(powersgd).items():
                taken[name] += gradient
                true[name] += mean(own[name])
                owed = mean(powersgd.factored[name].error) if name in MATRICES else 0
                off = (taken[name] + owed - true[name]).norm() / true[name].norm()
                assert off < (0.01 if paper else 1e-5), off
                assert (off > 1e-5) == (paper and name in MATRICES)
                if name in MATRICES:
                    assert owed.norm() > 0.1 * true[name].norm()  # something was left out
                assert same_everywhere(gradient)
            qs.append(powersgd.factored["qkv.weight"].qs[2].clone())
            assert same_everywhere(qs[-1])
            assert not torch.equal(*powersgd.factored["qkv.weight"].qs[:2])
        assert all(torch.equal(a, b) == (settings not in SETTINGS[1:3]) for a, b in pairwise(qs))
        for one in powersgd.factored.values():
            assert torch.equal(one.error, rounded(one.error, MEAN)) == paper


def check_resuming_changes_no_bit() -> None:
    for settings in SETTINGS:
        first, resumed = averager(**settings), averager(**settings)
        for number in range(3):
            step(first, number)
        owed = mean(first.factored["wide"].error)
        saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
        torch.testing.assert_close(saved["error/wide"], owed, rtol=0.01, atol=1e-5)
        assert all(same_everywhere(tensor) for tensor in saved.values())
        resumed.load_state_dict(saved)
        for number in range(3, 6):
            for powersgd in (first, resumed):
                step(powersgd, number)
            for name, gradient in gradients(first).items():
                assert torch.equal(gradient, resumed.parameters[name].grad), settings
        for name, one in first.factored.items():
            assert torch.equal(one.error, resumed.factored[name].error)


def check_what_is_factored_no_more_is_owed_no_more() -> None:
    """As when shards, and so what their factors save, are of another number. Another model's are refused."""
    fewer = PowerSGD(parameters(), {"wide": 1}, PowerSGDConfig(3), seed=7)
    more = averager()
    for powersgd in (fewer, more):
        step(powersgd, 0)
    few, many = fewer.state_dict(), more.state_dict()
    fewer.load_state_dict(many)
    assert torch.equal(fewer.factored["wide"].error, many["error/wide"])
    fresh = averager()
    fresh.load_state_dict(few)
    assert torch.equal(fresh.factored["wide"].error, few["error/wide"])
    assert not fresh.factored["tall"].error.any()
    for wrong in ({}, many | {"error/other": torch.zeros(1)}, many | {"error/wide": torch.zeros(3, 3)}):
        with pytest.raises(ValueError, match="PowerSGD"):
            more.load_state_dict(wrong)


def check_a_gradient_that_is_not_finite_anywhere_is_inf_everywhere_and_touches_no_error() -> None:
    powersgd = averager()
    step(powersgd, 0)
    before = {name: one.error.clone() for name, one in powersgd.factored.items()}
    own = give(powersgd, 1)
    if dist.get_rank() == 1:
        powersgd.parameters["tall"].grad[3, 3] = torch.nan
    powersgd.reduce(1)
    assert powersgd.parameters["tall"].grad.isinf().all()
    assert torch.equal(powersgd.parameters["wide"].grad, own["wide"])
    for name, one in powersgd.factored.items():
        assert torch.equal(one.error, before[name])
    mine = torch.tensor([True, dist.get_rank() == 0])
    assert powersgd.all_true(mine).tolist() == [True, False]


def check_a_buffer_that_overflowed_starts_again_and_the_others_keep_what_they_owe() -> None:
    powersgd = averager()
    if dist.get_rank() == 1:
        powersgd.factored["wide"].error[0, 0] = torch.inf
    own = step(powersgd, 0)
    assert powersgd.parameters["wide"].grad.isinf().all()
    wide = powersgd.factored["wide"].error
    assert torch.equal(wide, torch.zeros_like(wide) if dist.get_rank() == 1 else own["wide"])
    assert torch.equal(powersgd.factored["tall"].error, own["tall"])
    step(powersgd, 1)
    assert all(gradient.isfinite().all() for gradient in gradients(powersgd).values())


def check_nothing_is_read_from_the_device() -> None:
    for settings in SETTINGS:
        powersgd = averager(**settings)
        step(powersgd, 0)
        give(powersgd, 1)
        with HostWaits() as waits:
            powersgd.reduce(1)
        assert not waits.found


def check_a_skipped_step_keeps_q() -> None:
    powersgd = averager(q_mode="warm_start")
    step(powersgd, 0)
    before = [q.clone() for q in powersgd.factored["qkv.weight"].qs]
    give(powersgd, 1)
    powersgd.parameters["tall"].grad[0, 0] = torch.inf
    powersgd.reduce(1)
    assert all(map(torch.equal, powersgd.factored["qkv.weight"].qs, before))
    powersgd.factored["tall"].error[0, 0] = torch.inf
    step(powersgd, 2)
    assert all(map(torch.equal, powersgd.factored["qkv.weight"].qs, before))
    step(powersgd, 3)
    assert not any(map(torch.equal, powersgd.factored["qkv.weight"].qs, before))


def check_what_is_sent_is_counted() -> None:
    factors = 3 * (12 + 20) + 3 * (24 + 12) + 3 * 3 * (12 + 12)
    others = 30 * 12 + 12
    everything = others + 12 * 20 + 24 * 12 + 36 * 12
    for formats, width in (("fp32", 4), ("paper", 2)):
        powersgd = averager(message_dtype=formats)
        step(powersgd, 0)
        assert powersgd.sent == width * factors + 4 * others
        assert powersgd.traffic()["comm_ratio"] == powersgd.sent / (4 * everything)


class Given(nn.Module):
    """A matrix whose gradient is what is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 20))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()


def check_torchs_hook_does_the_same_when_its_q_is_put_back_or_left() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    for q in ("fixed", "warm_start"):
        ours = PowerSGD(
            {"weight": nn.Parameter(torch.zeros(8, 20))}, {"weight": 1}, PowerSGDConfig(3, q_mode=q), seed=7
        )
        start = ours.factored["weight"].qs[0].clone()
        theirs = nn.parallel.DistributedDataParallel(Given())
        state = PowerSGDState(None, 3, start_powerSGD_iter=2, min_compression_rate=1)
        theirs.register_comm_hook(state, powerSGD_hook)
        for number in range(6):
            (own,) = give(ours, number).values()
            if number == 2 or (number > 2 and q == "fixed"):
                state.p_memory_dict[0] = torch.empty(8 * 3)
                state.q_memory_dict[0] = start.flatten().clone()
            theirs.zero_grad()
            theirs(own).backward()
            if number >= 2:
                ours.reduce(number)
                found = [ours.parameters["weight"].grad, ours.factored["weight"].error.flatten()]
                expected = [theirs.module.weight.grad, state.error_dict[0]]
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def shards_are_factored_each_by_itself() -> None:
    """hsdp, 2 replicas of 2 shards: the same as two plain PowerSGDs, each over one half of every matrix."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    place, group = mesh["shard"].get_local_rank(), mesh["replicate"].get_group()
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleList([nn.Linear(20, 12)]))
    plain = nn.Linear(20, 12)
    plain.load_state_dict(model[0][0].state_dict())
    fully_shard(model[0][0], mesh=mesh["shard"])
    powersgd = build_powersgd(model, PowerSGDConfig(4), seed=7, group=group)
    half = nn.Parameter(torch.zeros(6, 20))
    twin = PowerSGD({"w": half}, {"w": 1}, PowerSGDConfig(2), seed=7, group=group)
    twin.factored["w"].qs = powersgd.factored["0.0.weight"].qs
    for number in range(3):
        torch.manual_seed(10 * number + dist.get_rank())
        x = torch.randn(5, 20)
        for net in (model[0][0], plain):
            net.zero_grad()
            net(x).square().mean().backward()
        whole = plain.weight.grad.clone()
        dist.all_reduce(whole, group=mesh["shard"].get_group())
        half.grad = whole[6 * place : 6 * place + 6] / 2
        for one in (powersgd, twin):
            one.reduce(number)
        gradient = model[0][0].weight.grad.to_local()
        torch.testing.assert_close(gradient, half.grad)
        pieces = [torch.empty_like(gradient) for _ in range(2)]
        dist.all_gather(pieces, gradient.contiguous(), group=group)
        assert torch.equal(*pieces)
    saved = powersgd.state_dict()
    assert saved["error/0.0.weight"].full_tensor().shape == (12, 20)
    assert powersgd.factored["0.0.weight"].error.any()
    powersgd.load_state_dict({name: error * 0 + 1 for name, error in saved.items()})
    assert (powersgd.factored["0.0.weight"].error == 1).all()
    with pytest.raises(ValueError, match="checkpoint"):
        build_powersgd(model, PowerSGDConfig(4, q_mode="warm_start"), seed=7, group=group)
    uneven = nn.Sequential(nn.ModuleList([nn.Linear(20, 13)]))  # 7 rows and 6
    fully_shard(uneven[0][0], mesh=mesh["shard"])
    assert not build_powersgd(uneven, PowerSGDConfig(4), seed=7, group=group).factored


CHECKS = [name for name in list(globals()) if name.startswith("check_")]


def run_checks(rank: int, names: list[str]) -> dict[str, str]:
    """Check -> its traceback in this process, if it fails."""
    errors = {}
    for name in names:
        errors[name] = traceback_of(globals()[name])
        dist.barrier()
    return errors

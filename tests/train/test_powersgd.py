"""PowerSGD: two replicas (the checks of tests/helpers/powersgd_worker.py), ranks and rates."""

import pytest
import torch

from dalle.hub.registry import build_model
from dalle.train.config import POWERSGD_RANKS, PowerSGDConfig, compression_rate
from dalle.train.fsdp import shard_dim
from dalle.train.powersgd import (
    all_orthonormal,
    build_powersgd,
    factors_are_smaller,
    orthonormal,
    stacked_matrices,
)
from dalle.transformer.config import SIZES
from tests.helpers.powersgd_worker import CHECKS, run_checks
from tests.helpers.processes import run_group


@pytest.fixture(scope="module")
def errors() -> list[dict[str, str]]:
    """Check -> its traceback, of two replicas."""
    return run_group(2, run_checks, list(CHECKS))


@pytest.mark.parametrize("check", CHECKS)
def test_two_replicas(check, errors):
    assert [replica[check] for replica in errors] == ["", ""]


@pytest.mark.slow
def test_two_replicas_of_two_shards():
    check = "shards_are_factored_each_by_itself"
    assert run_group(4, run_checks, [check]) == [{check: ""}] * 4


@pytest.mark.parametrize(
    ("size", "rank", "rate"), [("2.8b", 512, 0.83), ("5.6b", 640, 0.85), ("12b", 896, 0.86)]
)
def test_the_ranks_and_rates_of_table_1(size, rank, rate):
    width = SIZES[size].width
    assert POWERSGD_RANKS[width] == rank
    assert compression_rate(width, rank) == pytest.approx(1 - 5 * rank / (8 * width))
    assert compression_rate(width, rank) == pytest.approx(rate, abs=0.005)


def comm_ratio(width: int, rank: int, shards: int, by_paper: bool = True) -> float:
    """Share of a layer's gradients that one process sends, its matrices sharded by the longer side or not."""
    sent = full = 0
    for shape, stacked in (((3, 1), 3), ((1, 1), 1), ((4, 1), 1), ((1, 4), 1)):
        sides = [side * width for side in shape]
        sides[shard_dim(tuple(sides), shards) if by_paper else 0] //= shards
        rows, columns = sides
        assert factors_are_smaller((rows, columns), stacked, rank // shards)
        sent += stacked * (rank // shards) * (rows // stacked + columns)
        full += rows * columns
    return sent / full


@pytest.mark.parametrize(("width", "rank"), POWERSGD_RANKS.items())
@pytest.mark.parametrize("shards", [1, 8])
def test_the_factors_of_a_layer_have_the_size_of_table_2(width, rank, shards):
    assert 1 - comm_ratio(width, rank, shards) == pytest.approx(compression_rate(width, rank, shards))


def test_the_second_matrix_of_the_mlp_is_cut_by_inputs_since_that_sends_less():
    assert shard_dim((3968, 4 * 3968), 8) == 1
    assert shard_dim((4 * 3968, 3968), 8) == shard_dim((3968, 3968), 8) == 0
    assert shard_dim((3968,), 8) == shard_dim((4, 6), 8) == 0  # 6 does not divide evenly
    assert comm_ratio(3968, 896, 8) < comm_ratio(3968, 896, 8, by_paper=False)


@pytest.mark.parametrize(("shape", "rank"), [((12, 12), 6), ((12, 20), 8), ((0, 20), 1), ((1, 20), 1)])
def test_what_its_factors_would_not_make_smaller_is_sent_whole(shape, rank):
    assert not factors_are_smaller(shape, 1, rank)


def test_only_matrices_of_layers_are_factored_and_queries_keys_and_values_apart(tiny_runs):
    counts = {"attention.f.qkv": 3, "attention.f.out": 1, "mlp.f.expand": 1, "mlp.f.project": 1}
    assert stacked_matrices(build_model("transformer", tiny_runs.transformer.model)) == {
        f"layers.{layer}.{name}.weight": count for layer in (0, 1) for name, count in counts.items()
    }


def test_columns_are_orthonormal_and_so_the_norm_of_a_gradient_is_that_of_its_q():
    """E.2 sums the squared norms of Q for the global norm."""
    torch.manual_seed(0)
    p, q = orthonormal(torch.randn(30, 5)), torch.randn(40, 5)
    torch.testing.assert_close(p.T @ p, torch.eye(5))
    torch.testing.assert_close((p @ q.T).norm(), q.norm())
    for empty in (torch.zeros(30, 5), torch.ones(30, 5)):  # a span of fewer dimensions
        p = orthonormal(empty)
        torch.testing.assert_close(p.T @ p, torch.eye(5))


def test_matrices_of_one_shape_are_factored_in_one_call(monkeypatch):
    torch.manual_seed(0)
    ps = [torch.randn(6 + i % 2, 3) for i in range(5)]
    alone = [orthonormal(p) for p in ps]
    calls, qr = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda stack: (calls.append(len(stack)), qr(stack))[1])
    for together, one in zip(all_orthonormal(ps), alone, strict=True):
        assert torch.equal(together, one)
    assert calls == [3, 2]


def test_one_process_has_nothing_to_average():
    model = torch.nn.Linear(4, 4)
    assert build_powersgd(model, PowerSGDConfig(2), seed=0) is None

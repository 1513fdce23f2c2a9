"""The order of samples, a permutation per epoch: dalle/data/sampler.py."""

from collections import Counter
from itertools import islice, permutations

import numpy as np
import pytest

from dalle.data.sampler import FeistelPermutation, batch_indices


def order(size, *key):
    return FeistelPermutation(size, "order", *key)(np.arange(size)).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 63, 64, 65, 1000, 4096, 100_003])
def test_every_number_comes_once(size):
    assert sorted(order(size, 0, 0)) == list(range(size))


def test_a_billion_samples_need_no_table():
    size = 10**9
    places = np.concatenate([np.arange(50_000), np.arange(size - 50_000, size)])
    numbers = FeistelPermutation(size, "order", 0, 0)(places)
    assert len(set(numbers.tolist())) == 100_000
    assert numbers.max() < size
    assert np.histogram(numbers, 10, (0, size))[0] == pytest.approx(10_000, abs=500)  # 5 standard deviations


def test_the_order_is_pinned():
    """A change of these numbers changes the order of every run: old runs would go on with another one."""
    assert order(10, 0, 0) == [2, 3, 9, 0, 5, 6, 8, 7, 4, 1]
    large = FeistelPermutation(10**9, "order", 3, 7)(np.arange(3))
    assert large.tolist() == [55825314, 649763454, 959558517]


@pytest.mark.parametrize("size", [3, 4])
def test_each_order_of_a_small_set_is_as_likely(size):
    draws = 1200
    counts = Counter(tuple(order(size, seed, 0)) for seed in range(draws))
    expected = draws / len(list(permutations(range(size))))
    chi_squared = sum((counts[p] - expected) ** 2 / expected for p in permutations(range(size)))
    assert chi_squared < {3: 20.5, 4: 49.7}[size]  # 5 and 23 degrees of freedom, one in a thousand


def test_neighbors_in_the_order_and_epochs_are_independent():
    numbers = FeistelPermutation(10_000, "order", 0, 0)(np.arange(10_000)).astype(np.int64)
    steps = np.diff(numbers)
    assert (abs(steps) == 1).sum() < 15  # 2 expected
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), numbers)[0, 1]) < 0.05
    # epochs are independent
    same = [(np.array(order(100, 0, e)) == np.array(order(100, 0, e + 1))).sum() for e in range(200)]
    assert np.mean(same) == pytest.approx(1, abs=0.3)  # fixed points of a random permutation


@pytest.mark.parametrize("world", [2, 3, 6])
@pytest.mark.parametrize("size", [None, 5, 17])
def test_the_shares_of_a_step_together_are_the_step(world, size):
    for step in range(8):
        shares = [batch_indices(step, 6, size, 1, rank, world) for rank in range(world)]
        assert [sample for share in shares for sample in share] == batch_indices(step, 6, size, 1)
        assert {len(share) for share in shares} == {6 // world}
    with pytest.raises(ValueError, match="batch of 10 does not divide among 4 processes"):
        batch_indices(0, 10, 100, 0, rank=0, world=4)


def samples_of(batch_size, size, seed, count):
    """The first samples, step after step."""
    steps = (batch_indices(step, batch_size, size, seed) for step in range(-(-count // batch_size)))
    return list(islice((sample for step in steps for sample in step), count))


@pytest.mark.parametrize("batch_size", [1, 4, 10, 7, 23])
def test_every_epoch_is_a_permutation_whatever_the_batch_size(batch_size):
    samples = samples_of(batch_size, size=10, seed=0, count=50)
    assert samples == samples_of(8, 10, 0, 50)
    assert [epoch for epoch, _ in samples] == [i // 10 for i in range(50)]
    for epoch in range(5):
        assert sorted(index for _, index in samples[10 * epoch : 10 * epoch + 10]) == list(range(10))


def test_batches_span_epochs_and_an_endless_dataset_is_read_in_order():
    assert [epoch for epoch, _ in batch_indices(0, 7, 3, 0)] == [0, 0, 0, 1, 1, 1, 2]
    assert list(batch_indices(3, 4, None, seed=5)) == [(0, 12), (0, 13), (0, 14), (0, 15)]

"""Sampling of ids from logits, and the random numbers of a candidate (dalle/sampling.py)."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch

from dalle.sampling import (
    SamplingConfig,
    candidate_noise,
    candidate_normals,
    generator,
    invert_cumulative,
    sample_tokens,
)


def numbers(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample_many(logits, n=20_000, **options):
    """Counts of n samples from one row of logits."""
    return torch.bincount(sample_tokens(logits.expand(n, -1), numbers(n), **options), minlength=len(logits))


# The random numbers.


def test_numbers_differ_by_seed_caption_candidate_and_position():
    settings = itertools.product([0, 1, 2**40], ["", "a", "b", "a b", "ä"], [range(2), range(1000, 1001)])
    everything = torch.cat([candidate_noise(*setting, 8).flatten() for setting in settings])
    assert len(everything.unique()) == len(everything) == 3 * 5 * 3 * 8


def philox(purpose):
    digest = hashlib.blake2b(purpose.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@pytest.mark.parametrize("candidates", [range(3), range(2, 3), range(1000, 1002)])
@pytest.mark.parametrize(("seed", "caption"), [(0, "a red square"), (1, "2"), (12, ""), (2**40, "ä")])
def test_a_candidate_has_its_numbers_whatever_the_others_and_the_positions(seed, caption, candidates):
    """They may never change: a seed and a candidate's index identify an image."""
    expected = [philox(f"candidate\n{seed}\n{i}\n{caption}").random(30).tolist() for i in candidates]
    for positions in (30, 4):
        found = candidate_noise(seed, caption, candidates, positions)
        assert found.tolist() == [row[:positions] for row in expected]


def test_numbers_are_uniform_and_do_not_touch_global_state():
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    many = candidate_noise(0, "dog", range(100), 100)
    after = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert (many.shape, many.dtype) == ((100, 100), torch.float64)
    assert many.min() >= 0
    assert many.max() < 1
    counts = torch.histc(many, bins=10, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 33.7  # chi-square, 9 degrees: once in 10,000


@pytest.mark.parametrize("candidates", [range(3), range(2, 3), range(1000, 1002)])
@pytest.mark.parametrize(("seed", "caption", "step"), [(0, "a red square", 0), (1, "2", 999), (2**40, "", 3)])
def test_a_candidate_has_its_normal_numbers_at_each_step_whatever_the_others(seed, caption, step, candidates):
    streams = [philox(f"normals\n{seed}\n{i}\n{step}\n{caption}") for i in candidates]
    expected = np.stack([stream.standard_normal((3, 4, 5), np.float32) for stream in streams])
    found = candidate_normals(seed, caption, candidates, step, (3, 4, 5))
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), expected)


def test_normal_numbers_are_normal_and_differ_by_seed_caption_candidate_and_step():
    settings = itertools.product([0, 1], ["", "a", "1"], [range(2), range(10, 12)], [0, 1, 11])
    everything = torch.stack([candidate_normals(*setting, (1000,)) for setting in settings])
    assert len(everything.unique()) > 0.99 * everything.numel()  # of float32, and so a few meet by chance
    assert torch.corrcoef(everything.flatten(0, 1)).triu(diagonal=1).abs().max() < 0.17  # 5 deviations
    fourth = everything.double().pow(4).mean().item()
    assert everything.mean().abs() < 0.015
    assert everything.var().item() == pytest.approx(1, abs=0.02)
    assert fourth == pytest.approx(3, abs=0.2)


# Sampling.


def test_samples_are_distributed_as_softmax():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    expected = 20_000 * torch.softmax(logits, dim=0)
    assert ((sample_many(logits) - expected) ** 2 / expected).sum() < 23.5  # 4 degrees: once in 10,000


def test_temperature_divides_the_logits():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    assert torch.equal(sample_many(logits, temperature=0.5), sample_many(2 * logits))


def test_a_sample_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(6, 4)
    uniform = torch.tensor([0.0, 0.09, 0.11, 0.31, 0.59, 0.61])
    assert sample_tokens(logits, uniform).tolist() == [0, 0, 1, 2, 2, 3]


def test_rows_are_sampled_independently():
    logits = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0]]).log()
    assert sample_tokens(logits, numbers(3)).tolist() == [0, 2, 1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 0])
def test_a_low_temperature_takes_the_most_likely(temperature):
    logits = 10 * torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) + 100
    assert torch.equal(sample_tokens(logits, numbers(50), temperature=temperature), logits.argmax(dim=1))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2}, {"top_p": 0.9}, {"temperature": 3.0}, {"temperature": 0.0}]
)
def test_minus_infinity_is_never_sampled(uniform, options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 30, generator=generator)
    logits[torch.rand(200, 30, generator=generator) < 0.7] = -torch.inf
    logits[:, 7] = 0.0
    ids = sample_tokens(logits, torch.full((200,), uniform, dtype=torch.float64), **options)
    assert torch.isfinite(logits.gather(1, ids[:, None])).all()


def test_16_bit_logits_are_sampled_in_full_precision():
    """In bf16 the cumulative distribution would stop growing long before 8192 equal shares are summed."""
    ids = sample_tokens(torch.zeros(1, 8192, dtype=torch.bfloat16).expand(9, -1), torch.arange(9) / 9)
    assert ids.tolist() == [8192 * i // 9 for i in range(9)]


FORMATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EDGES = [0.0, 5e-324, 1e-45, 2**-24, 0.5, 1 - 2**-8, 1 - 2**-11, 1 - 2**-24, 1 - 2**-25, 1 - 2**-53, 1.0]


def edge_logits():
    """Rows whose mass is at the beginning, at the end, in one id, in all, or too small for some."""
    ids = torch.arange(40.0)
    rows = torch.stack([ids % 7, -ids, ids, 0 * ids, (ids % 5) * 40, (ids == 11) * 200.0, -1e4 * ids])
    front, back = rows.masked_fill(ids > 20, -torch.inf), rows.masked_fill(ids < 20, -torch.inf)
    return torch.cat([rows, front, back[:5]])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("uniform", FORMATS, ids=str)
def test_every_edge_of_the_uniforms_gives_an_id_with_mass(uniform, whole):
    """A uniform rounded to 1 takes the last id with mass, whatever follows it."""
    probability = torch.softmax(edge_logits(), dim=1)
    largest = torch.tensor(1, dtype=uniform).nextafter(torch.tensor(0, dtype=uniform)).double().item()
    for edge in (*EDGES, largest):
        ids = invert_cumulative(probability, torch.full((len(probability),), edge, dtype=uniform), whole)
        assert probability.gather(1, ids[:, None]).min() > 0
        assert whole or edge < 1 or ids.tolist()[7:9] == [20, 20]  # of the rows that end with -inf


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}, {"temperature": 0.01}])
@pytest.mark.parametrize("logits", FORMATS[1:], ids=str)
def test_every_edge_and_truncation_gives_an_id_that_is_kept(logits, options):
    rows = edge_logits().clamp(min=-6e4).to(logits)  # fp16 has nothing below
    for edge, uniform in itertools.product(EDGES, FORMATS):
        ids = sample_tokens(rows, torch.full((len(rows),), edge, dtype=uniform), **options)
        rank = (rows > rows.gather(1, ids[:, None])).sum(dim=1)
        assert 0 <= ids.min() <= ids.max() < 40
        assert rank.max() < options.get("top_k", 40)


def test_whole_numbers_have_the_distribution_of_float64():
    probability = torch.softmax(3 * torch.randn(50, 8192, generator=torch.Generator().manual_seed(0)), dim=1)
    uniform = numbers(50)
    assert torch.equal(*(invert_cumulative(probability, uniform, whole) for whole in (False, True)))
    logits = torch.full((1, 5), torch.nan)
    assert [invert_cumulative(logits, numbers(1), whole).item() for whole in (False, True)] == [5, 5]


# Truncation, against a written-out reference.


def kept_ids(logits, top_k=None, top_p=None, min_p=0, temperature=1):
    """Probabilities of the ids kept: of the k most likely the fewest that reach p, less the unlikely."""
    logits = [x / temperature for x in logits]
    ids = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    shares = np.exp([logits[i] for i in ids])
    shares /= shares.sum()
    if top_p is not None:
        count = next(n for n in range(1, len(ids) + 1) if shares[:n].sum() >= top_p)
        ids, shares = ids[:count], shares[:count] / shares[:count].sum()
    count = sum(share >= min_p * shares[0] for share in shares)
    ids, shares = ids[:count], shares[:count] / shares[:count].sum()
    return dict(zip(ids, shares, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.8}, {"top_k": 1}, {"top_p": 0.01}]
    + [{"min_p": p} for p in (1e-9, 0.3, 0.7, 1.0)]
    + [{"min_p": 0.3, "temperature": 2.0}, {"min_p": 0.3, "top_k": 2}, {"min_p": 0.3, "top_p": 0.6}]
    + [{"min_p": 0.25, "top_p": 0.9, "top_k": 5, "temperature": 0.5}],
)
def test_truncated_samples_follow_the_reference(options):
    logits = torch.tensor([0.3, 2.1, -0.4, 1.2, 0.9, -2.0, 1.8])
    counts = sample_many(logits, **options)
    kept = kept_ids(logits.tolist(), **options)
    assert set(counts.nonzero().flatten().tolist()) == set(kept)
    for i, share in kept.items():
        assert counts[i] / 20_000 == pytest.approx(share, abs=0.015)  # 4 standard deviations at most


def test_truncation_is_each_rows_own():
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    for u in (0.0, 0.5, 0.99):
        assert sample_tokens(logits, torch.full((2,), u), top_k=1).tolist() == [2, 0]
        assert sample_tokens(logits, torch.full((2,), u), top_p=0.3).tolist() == [2, 0]


def test_top_k_keeps_k_even_where_logits_are_equal():
    assert (sample_many(torch.zeros(10), top_k=3) > 0).sum() == 3


@pytest.mark.parametrize(
    "options",
    [{"top_k": 8192}, {"top_k": 9000}, {"top_p": 1.0}, {"min_p": 0}, {"top_k": None, "top_p": None}],
)
def test_truncation_that_keeps_everything_changes_nothing(options):
    logits = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0))
    uniform = torch.cat([numbers(32), 1 - numbers(32, seed=1) * 1e-7])
    assert torch.equal(sample_tokens(logits, uniform, **options), sample_tokens(logits, uniform))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": value}, f"temperature .* got {value}") for value in (-0.1, 1e-40, math.nan, math.inf)]
    + [({"top_p": value}, f"top_p .* got {value}") for value in (0.0, 1.1, math.nan)]
    + [({"min_p": value}, f"min_p .* got {value}") for value in (-0.1, 1.1, math.nan)]
    + [({name: 0}, f"{name} .* got 0") for name in ("top_k", "batch_size", "decode_batch_size")]
    + [({"guidance": math.inf}, "guidance must be a finite number"), ({"guidance": 1e300}, "guidance .* 1e")],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


def test_purposes_and_keys_have_generators_of_their_own():
    keys = [("scene", 1, 2), ("scene", 2, 1), ("caption", 1, 2), ("crop", 1, 2), ("order", 1, 2)]
    values = [generator(*key).random() for key in keys]
    assert len(set(values)) == len(keys)
    assert [generator(*key).random() for key in keys] == values

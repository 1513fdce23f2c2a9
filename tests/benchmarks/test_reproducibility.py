"""Images of one seed, drawn in several ways: what is the same, and what is counted."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from dalle import DALLE
from dalle.benchmarks.studies.reproducibility import (
    AgreementBenchmark,
    Way,
    benchmark_agreement,
    drawn,
    equal_shares,
    nats_lost,
    ways,
)


@pytest.fixture
def run(chain, prompt: str, tmp_path):
    return AgreementBenchmark(
        chain / "model",
        (prompt, prompt + " again"),
        5,
        batch=(2, 3),
        devices=("cpu",),
        json=tmp_path / "a.json",
    )


def test_each_way_differs_from_the_reference_in_one_thing(run):
    int8 = [Way(2, name, "cpu", int8=True) for name in ("fp32", "bf16")]
    assert ways(run) == [Way(2, "fp32", "cpu"), Way(3, "fp32", "cpu"), Way(2, "bf16", "cpu"), *int8]
    assert not set(int8) & set(ways(replace(run, int8=False)))


def test_candidates_are_those_that_generate_draws(run, dalle: DALLE):
    tokens = drawn(run, dalle, Way(2, "fp32", "cpu"))
    for row, prompt in zip(tokens, run.prompts, strict=True):
        generation = dalle.generate(prompt, n=5, best_of=5, batch=2, progress=False)
        order = torch.tensor(generation.candidates).argsort()
        assert torch.equal(row, generation.image_tokens[order].cpu())


def test_shares_count_whole_images_and_single_tokens():
    expected = torch.zeros(2, 2, 4, dtype=torch.int64)
    other = expected.clone()
    other[1, 1, 3] = 1
    assert equal_shares(other, expected) == {"images": 0.75, "tokens": 0.9375}


def test_the_report_names_each_way(run):
    benchmark_agreement(run)
    report = json.loads(run.json.read_text(encoding="utf-8"))
    assert report["images"] == 10
    assert list(report["equal"]) == [
        "batch 3, fp32, cpu",
        "batch 2, bf16, cpu",
        "batch 2, fp32, int8 matrices, cpu",
        "batch 2, bf16, int8 matrices, cpu",
    ]
    assert list(report["nats_lost_a_token"]) == list(report["equal"])[1:]
    assert all(0 <= share <= 1 for shares in report["equal"].values() for share in shares.values())


def test_nats_lost_are_those_of_the_references_images(run, dalle: DALLE):
    """An untrained model is near to uniform; one whose matrices are large is not, and rounding tells."""
    model = copy.deepcopy(dalle)
    with torch.no_grad():
        model.transformer.to_logits.weight.normal_(generator=torch.Generator().manual_seed(0))
    reference, other = Way(2, "fp32", "cpu"), Way(2, "fp32", "cpu", int8=True)
    tokens = drawn(run, model, reference)
    found = nats_lost(run, model, reference, [Way(3, "fp32", "cpu"), other], tokens)
    assert list(found) == [str(other)]
    rounded = model.to_precision("fp32", int8=True)
    lost = [
        (model.log_likelihood(prompt, some).image - rounded.log_likelihood(prompt, some).image)
        / tokens.shape[2]
        for prompt, some in zip(run.prompts, tokens, strict=True)
    ]
    assert found[str(other)] == pytest.approx(
        (torch.cat(lost).mean().item(), torch.cat(lost).std().item() / 10**0.5)
    )
    assert found[str(other)][0] != 0


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="must each name at least one"):
        AgreementBenchmark(batch=())
    with pytest.raises(ValueError, match="candidates and batch must be positive"):
        AgreementBenchmark(candidates=0)
    with pytest.raises(ValueError, match="two images or more are needed to tell an error"):
        AgreementBenchmark(prompts=("a cat",), candidates=1)

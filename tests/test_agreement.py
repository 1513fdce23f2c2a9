"""Pictures of one seed, drawn in several ways: what is the same, and what is counted."""

import json

import pytest
import torch

from dalle import DALLE
from dalle.stages.agreement import AgreementBenchmark, Way, benchmark_agreement, drawn, equal_shares, ways


@pytest.fixture
def run(chain, prompt: str, tmp_path):
    return AgreementBenchmark(
        chain / "model", (prompt, prompt + " again"), 5, batch=(2, 3), devices=("cpu",), json=tmp_path / "a.json"
    )


def test_each_way_differs_from_the_reference_in_one_thing(run):
    assert ways(run) == [Way(2, "fp32", "cpu"), Way(3, "fp32", "cpu"), Way(2, "bf16", "cpu")]


def test_candidates_are_those_that_generate_draws(run, dalle: DALLE):
    tokens = drawn(run, dalle, Way(2, "fp32", "cpu"))
    for row, prompt in zip(tokens, run.prompts, strict=True):
        generation = dalle.generate(prompt, n=5, best_of=5, batch=2, progress=False)
        order = torch.tensor(generation.candidates).argsort()
        assert torch.equal(row, generation.image_tokens[order].cpu())


def test_shares_count_whole_pictures_and_single_tokens():
    expected = torch.zeros(2, 2, 4, dtype=torch.int64)
    other = expected.clone()
    other[1, 1, 3] = 1
    assert equal_shares(other, expected) == {"pictures": 0.75, "tokens": 0.9375}


def test_the_report_names_each_way(run):
    benchmark_agreement(run)
    report = json.loads(run.json.read_text(encoding="utf-8"))
    assert report["pictures"] == 10
    assert list(report["equal"]) == ["batch 3, fp32, cpu", "batch 2, bf16, cpu"]
    assert all(0 <= share <= 1 for shares in report["equal"].values() for share in shares.values())


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="must each name at least one"):
        AgreementBenchmark(batch=())
    with pytest.raises(ValueError, match="candidates and batch must be positive"):
        AgreementBenchmark(candidates=0)

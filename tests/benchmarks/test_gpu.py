"""The GPU benchmark: parts that fail, hang or have no time left, the report, a dry run of all parts."""

import json
from typing import get_args

import pytest

from dalle.benchmarks import gpu
from dalle.benchmarks.config import GPUBenchmark, PartName, RatesBenchmark
from dalle.benchmarks.rates import benchmark_rates
from dalle.commands.benchmark import BENCHMARKS
from dalle.config import parse


def report_of(tmp_path, **words):
    report = gpu.benchmark_gpu(GPUBenchmark(json=tmp_path / "gpu.json", device="cpu", small=True, **words))
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    return report


def test_a_part_that_fails_or_hangs_ends_alone(tmp_path, monkeypatch):
    """And what has no time left is named."""
    fails = ("-c print('nothing_here')or(1/0)",) * 2
    hangs = ("-c __import__('time').sleep(60)",) * 2
    monkeypatch.setattr(gpu, "COMMANDS", {"tests": fails})
    part = report_of(tmp_path, parts=("tests",))["parts"]["tests"]
    assert part["status"] == "failed"
    assert "nothing_here" in part["output"]
    assert "ZeroDivisionError" in part["output"]
    monkeypatch.setattr(gpu, "COMMANDS", {"tests": hangs, "rates": hangs})
    parts = report_of(tmp_path, parts=("tests", "rates"), minutes=0.02)["parts"]
    assert [part["status"] for part in parts.values()] == [gpu.TIMED_OUT, gpu.NO_TIME]
    assert parts["tests"]["seconds"] < 20


def test_a_part_takes_half_of_the_time_that_is_left_or_a_minute(tmp_path, monkeypatch):
    """So that one that hangs leaves time for the others."""
    given, answer = [], {"status": "done", "seconds": 0.0}
    monkeypatch.setattr(gpu, "run_part", lambda *arguments: given.append(arguments[3]) or answer)
    for minutes in (8, 1.5, 0.5):
        report_of(tmp_path, parts=("tests",), minutes=minutes)
    assert given == pytest.approx([240, 60, 30], abs=5)


def test_every_part_is_known_and_named_where_it_is_chosen():
    assert set(gpu.COMMANDS) == set(get_args(PartName))
    for name, sizes in gpu.COMMANDS.items():
        for words in map(str.split, sizes if name != "tests" else ()):
            parse(BENCHMARKS[words[0]], words[1:])  # SystemExit for a wrong option
    for words in ({"minutes": 0}, {"minutes": float("nan")}, {"parts": ()}):
        with pytest.raises(ValueError, match=next(iter(words))):
            GPUBenchmark(**words)


def test_figures_come_from_the_reports():
    line = {"batch": 1, "seconds_per_image": 8.0, "weight_bytes_per_sec": 3e12}
    candidates = {str(batch): {"batch": batch, "seconds_per_image": 16 / batch} for batch in (64, 128)}
    candidates["256"] = {"batch": 256, "error": "out of memory"}
    parts = {
        "tests": {"status": "done", "output": "....\n=== 7 passed, 3000 deselected in 9.00s ==="},
        "rates": {"report": {"results": {"copy": {"bytes_per_sec": 4e12}}}},
        "sample-12b": {"report": {"results": {"batch 1": line}}},
        "candidates-12b": {"report": {"results": candidates}},
        "train-1.3b": {"status": gpu.TIMED_OUT, "output": ""},
    }
    figures = gpu.figures(parts)
    assert figures["tests"] == "7 passed, 3000 deselected in 9.00s"
    assert figures["sample_12b_copy_share"] == 0.75
    assert figures["candidates_12b_per_sec_batch_128"] == 8
    assert figures["best_of_512_seconds"] == 64
    assert not any(name.startswith("train") for name in figures)


def test_rates_are_those_of_the_work_that_was_done(monkeypatch):
    half_a_second = lambda work, rounds, device: {name: [0.5] for name in work}  # noqa: E731
    monkeypatch.setattr("dalle.benchmarks.rates.time_rounds", half_a_second)
    report = benchmark_rates(RatesBenchmark(megabytes=1, side=64, device="cpu"))
    assert report["results"]["copy"]["bytes_per_sec"] == 2 * 2**20 / 0.5
    assert report["results"]["matmul bfloat16"]["flops_per_sec"] == 2 * 64**3 / 0.5


@pytest.mark.slow
def test_a_dry_run_of_all_parts(tmp_path):
    report = report_of(tmp_path, minutes=5)
    skipped = report["parts"].pop("tests")
    assert skipped["status"] == "done", skipped
    for name, part in report["parts"].items():
        assert part["status"] == "done", (name, part)
    wanted = {"train_1.3b_tokens_per_sec", "sample_12b_copy_share", "sample_1.3b_copy_share", "dvae_seconds"}
    wanted |= {"best_of_512_seconds", "attention_auto_speedup_vs_causal_sdpa", "clip_seconds"}
    assert wanted | {"train_1.3b_peak_over_plan"} <= set(report["figures"])

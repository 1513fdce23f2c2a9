"""The benchmark command: refused settings, and a benchmark by its name."""

import pytest

from dalle.benchmarks.config import DataBenchmark, MemoryBenchmark, SampleBenchmark, TrainBenchmark


@pytest.mark.parametrize(
    ("args_class", "words", "message"),
    [
        (TrainBenchmark, {"rounds": 0}, "rounds must be positive"),
        (TrainBenchmark, {"backends": ()}, "backends must name at least one"),
        (TrainBenchmark, {"peak_flops": -1.0}, "peak-flops must be positive"),
        (MemoryBenchmark, {"batch_size": 0}, "batch-size must be positive"),
        (SampleBenchmark, {"batch": (0,)}, "batch must be positive"),
        (SampleBenchmark, {"tokens": 1}, "tokens must be 4 to 1024, got 1"),
        (DataBenchmark, {"num_batches": 0}, "num-batches must be positive"),
        (DataBenchmark, {"sources": ()}, "sources must name at least one"),
    ],
)
def test_bad_settings_are_refused(args_class, words, message):
    with pytest.raises(ValueError, match=message):
        args_class(**words)


def test_the_script_runs_a_benchmark_by_name(typed, script, tmp_path):
    shape = "--model.depth 1 --model.heads 1 --model.head-dim 8 --model.grid 4 4 --model.conv-kernel 3"
    options = f"--batch 1 --tokens 4 --precision fp32 --device cpu {shape}"
    assert "time_to_first_token" in typed(f"python scripts/benchmark.py sample {options}", tmp_path)
    assert script("benchmark", "train", "--backends", "flash9").code == 2
    failed = script("benchmark", "underflow")
    assert failed.code == 1
    assert "train, sample, data, attention, memory" in failed.err

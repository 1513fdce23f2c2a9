"""Measure speed and memory; every figure that the documentation quotes comes from here.

python scripts/benchmark.py train --model.depth 8 --model.heads 8 --batch-size 2
python scripts/benchmark.py train --size 120m --precision bf16 --json report.json
python scripts/benchmark.py train --baseline dalle-pytorch --precision fp32
python scripts/benchmark.py sample --batch 1 8 64 --json report.json
python scripts/benchmark.py sample --baseline dalle-pytorch --tokens 32
python scripts/benchmark.py data --sources my/images my/tars --workers 0 2 --resolutions 64 256
python scripts/benchmark.py attention --model.heads 4
python scripts/benchmark.py memory --size 60m
python scripts/benchmark.py open --size 120m
python scripts/benchmark.py families --precision bf16
python scripts/benchmark.py rates
python scripts/benchmark.py gpu --minutes 8 --json gpu.json     all that the paper's sizes need, on a GPU
"""

import sys
from importlib import import_module

from dalle.benchmarks import config
from dalle.config import cli_errors, parse
from dalle.help import overview

BENCHMARKS = {  # NAME is timed by dalle.benchmarks.NAME.benchmark_NAME
    "train": config.TrainBenchmark,
    "sample": config.SampleBenchmark,
    "data": config.DataBenchmark,
    "attention": config.AttentionBenchmark,
    "memory": config.MemoryBenchmark,
    "open": config.OpenBenchmark,
    "families": config.FamiliesBenchmark,
    "rates": config.RatesBenchmark,
    "gpu": config.GPUBenchmark,
}


def main() -> None:
    """Runs the benchmark that the first word names."""
    with cli_errors():
        overview(sys.argv[1:], __doc__, "--help after a name explains its options.")
        name = sys.argv[1] if len(sys.argv) > 1 else ""
        if name not in BENCHMARKS:
            raise ValueError(f"unknown benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}")
        args = parse(BENCHMARKS[name], sys.argv[2:], description=__doc__)
        getattr(import_module(f"dalle.benchmarks.{name}"), f"benchmark_{name}")(args)

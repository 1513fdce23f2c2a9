"""Measure speed and memory; every figure that the documentation quotes comes from here.

python scripts/benchmark.py train --model.depth 8 --model.heads 8 --batch-size 2
python scripts/benchmark.py train --size 120m --precision bf16 --json report.json
python scripts/benchmark.py data --sources my/pictures my/tars --workers 0 2 --resolutions 64 256
"""

import sys

from dalle.config import parse, tell_errors
from dalle.stages.benchmark import TrainBenchmark, benchmark_training
from dalle.stages.benchmark_data import DataBenchmark, benchmark_data

BENCHMARKS = {"train": (TrainBenchmark, benchmark_training), "data": (DataBenchmark, benchmark_data)}

if __name__ == "__main__":
    with tell_errors():
        name = sys.argv[1] if len(sys.argv) > 1 else ""
        if name not in BENCHMARKS:
            raise ValueError(f"say what to measure: python scripts/benchmark.py {{{','.join(BENCHMARKS)}}} [--help]")
        run_class, measure = BENCHMARKS[name]
        measure(parse(run_class, sys.argv[2:], description=__doc__))

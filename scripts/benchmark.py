"""Measure speed and memory; every figure that the documentation quotes comes from here.

python scripts/benchmark.py train --model.depth 8 --model.heads 8 --batch-size 2
python scripts/benchmark.py train --size 120m --precision bf16 --json report.json
python scripts/benchmark.py train --against dalle-pytorch --precision fp32
python scripts/benchmark.py sample --batch 1 8 64 --json report.json
python scripts/benchmark.py sample --against dalle-pytorch --tokens 32
python scripts/benchmark.py data --sources my/images my/tars --workers 0 2 --resolutions 64 256
python scripts/benchmark.py attention --heads 4
python scripts/benchmark.py memory --size 60m
python scripts/benchmark.py compression --steps 300 --image curves.png
python scripts/benchmark.py underflow --image underflow.png --scales scales.png --json underflow.json
python scripts/benchmark.py agreement --model runs/quickstart/model --candidates 64
python scripts/benchmark.py scales --run runs/transformer --image scales.png
"""

import sys

from dalle.benchmarks.attention import AttentionBenchmark, benchmark_attention
from dalle.benchmarks.data import DataBenchmark, benchmark_data
from dalle.benchmarks.memory import MemoryBenchmark, benchmark_memory
from dalle.benchmarks.sample import SampleBenchmark, benchmark_sampling
from dalle.benchmarks.studies.fp16_underflow import UnderflowBenchmark, benchmark_underflow
from dalle.benchmarks.studies.powersgd import CompressionBenchmark, benchmark_compression
from dalle.benchmarks.studies.reproducibility import AgreementBenchmark, benchmark_agreement
from dalle.benchmarks.train import TrainBenchmark, benchmark_training
from dalle.commands.plot import ScalesImage, draw_scales
from dalle.config import overview, parse, tell_errors

BENCHMARKS = {
    "train": (TrainBenchmark, benchmark_training),
    "sample": (SampleBenchmark, benchmark_sampling),
    "data": (DataBenchmark, benchmark_data),
    "attention": (AttentionBenchmark, benchmark_attention),
    "memory": (MemoryBenchmark, benchmark_memory),
    "compression": (CompressionBenchmark, benchmark_compression),
    "underflow": (UnderflowBenchmark, benchmark_underflow),
    "agreement": (AgreementBenchmark, benchmark_agreement),
    "scales": (ScalesImage, draw_scales),
}

if __name__ == "__main__":
    with tell_errors():
        overview(sys.argv[1:], __doc__, "--help after one of these words explains what it takes.")
        name = sys.argv[1] if len(sys.argv) > 1 else ""
        if name not in BENCHMARKS:
            raise ValueError(
                f"say what to measure: python scripts/benchmark.py {{{','.join(BENCHMARKS)}}} [--help]"
            )
        run_class, measure = BENCHMARKS[name]
        measure(parse(run_class, sys.argv[2:], description=__doc__))

"""Copy bandwidth and matrix product rates of a device: the limits that other benchmarks are compared with."""

from statistics import median
from typing import Any

import torch

from dalle.benchmarks.common import finish, time_rounds
from dalle.benchmarks.config import RatesBenchmark
from dalle.train.precision import resolve_device


def benchmark_rates(args: RatesBenchmark) -> dict[str, Any]:
    """Bytes per second of a copy, read and write counted, and FLOP/s of square matrices in each format."""
    device = resolve_device(args.device)
    source = torch.ones(int(args.megabytes * 2**20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work = {"copy": lambda: target.copy_(source)}
    for name in ("float32", "bfloat16", "float16"):
        a, b = torch.randn(2, args.side, args.side, device=device).to(getattr(torch, name))
        work[f"matmul {name}"] = lambda a=a, b=b: a @ b
    time_rounds(work, 1, device)
    seconds = {name: median(times) for name, times in time_rounds(work, args.rounds, device).items()}
    results = {"copy": {"bytes_per_sec": 2 * len(source) / seconds.pop("copy")}}
    results |= {name: {"flops_per_sec": 2 * args.side**3 / time} for name, time in seconds.items()}
    return finish({"results": results}, args.json, device)

"""Time and memory of opening a model directory, in a process of its own."""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dalle.benchmarks.common import finish, seconds_of
from dalle.benchmarks.config import OpenBenchmark
from dalle.hub.registry import build_model, load_model, write_model_directory
from dalle.train.loggers import peak_memory
from dalle.train.precision import resolve_device


def benchmark_open(args: OpenBenchmark) -> dict[str, Any]:
    """Seconds of the first opening, which compares the file's hash, and of later ones, and peak GiB."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        model = build_model("transformer", args.config)
        write_model_directory(Path(folder), {"transformer": model})
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
            results = pool.submit(time_openings, folder, args.device, args.rounds).result()
    report = {"results": results, "parameters": sum(p.numel() for p in model.parameters())}
    return finish(report, args.json, resolve_device(args.device))


def time_openings(folder: str, name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and peak GiB, before and after the first opening and after each later one."""
    device, results = resolve_device(name), {}
    torch.zeros(1, device=device)
    results["before"] = {"seconds": 0.0, "peak_gib": peak_memory(device)}
    for opening in ("first", *(f"later {i + 1}" for i in range(rounds))):
        seconds = seconds_of(lambda: load_model(folder, "transformer", device), device)
        results[opening] = {"seconds": seconds, "peak_gib": peak_memory(device)}
    return results

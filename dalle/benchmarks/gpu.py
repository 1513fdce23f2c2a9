"""GPU benchmark: tests and figures that the paper's sizes need, most important first, within a time limit.

Each part is a command of its own, in a process of its own: a part that fails, hangs or runs out of memory
ends alone, and the report is written again after each.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dalle.benchmarks.common import hardware
from dalle.benchmarks.config import GPUBenchmark
from dalle.config import PACKAGE
from dalle.io.files import make_directory, read_json, write_json
from dalle.train.precision import resolve_device

SMALL = (
    "--model.depth 2 --model.heads 2 --model.head-dim 8 --model.text-len 8 --model.grid 4 4 "
    "--model.conv-kernel 3"
)
COMMANDS = {  # a part's benchmark and options at full size, and at a size for trying it
    "tests": ("-m pytest tests -m cuda --tb short -p no:cacheprovider -o faulthandler_timeout=60",) * 2,
    "rates": ("rates", "rates --megabytes 1 --side 64"),
    "train-1.3b": (
        "train --size 1.3b --backends auto --precision bf16 --compile --batch-size 8 --plan",
        f"train --backends auto --rounds 1 --plan {SMALL}",
    ),
    "sample-12b": (
        "sample --size 12b --precision bf16 --batch 1 --tokens 128",
        f"sample --batch 1 --tokens 4 {SMALL}",
    ),
    "candidates-12b": (
        "sample --size 12b --precision bf16 --batch 32 64 128 256 --tokens 64",
        f"sample --batch 2 4 --tokens 4 {SMALL}",
    ),
    "attention": (
        "attention --precision bf16 --backends auto flex --batch-size 4",
        f"attention --backends auto --rounds 1 {SMALL}",
    ),
    "sample-1.3b": (
        "sample --size 1.3b --precision bf16 --batch 1 --tokens 128",
        f"sample --batch 1 --tokens 4 {SMALL}",
    ),
    "families": (
        "families --precision bf16",
        "families --rounds 1 --dvae.widths 4 8 8 8 --dvae.vocab-size 16 --resolution 32 --clip.image-size 32 "
        "--clip.vision-layers 1 --clip.text-layers 1 --clip.vision-width 64 --clip.text-width 64 "
        "--clip.embed-width 8 --dvae-batch 1 --clip-batch 2",
    ),
}
AIMS = {  # of the paper's sizes on an H200
    "train_1.3b_mfu": ">= 0.5",
    "sample_12b_copy_share": ">= 0.6",
    "sample_1.3b_copy_share": ">= 0.4",
    "best_of_512_seconds": "< 40",
}
SHARE = 0.5  # of the time left, the most that a part takes
AT_LEAST = 60  # seconds, where that is less
OUTPUT = 20_000  # characters of a failed part's output, at most
TIMED_OUT, NO_TIME = "timed out", "no time left"


def benchmark_gpu(args: GPUBenchmark) -> dict[str, Any]:
    """Runs the parts; prints a line of each when it ends, and the figures at the end."""
    device = resolve_device(args.device)
    end = time.monotonic() + 60 * args.minutes
    packages = {name: version(name) for name in ("torch", "open_clip_torch", "numpy")}
    report: dict[str, Any] = {"hardware": hardware(device), "packages": packages, "small": args.small}
    report |= {"parts": {}, "figures": {}}
    print(f"{report['hardware']['name']}, torch {torch.__version__}: {args.minutes:g} minutes", flush=True)
    for name in args.parts:
        left = end - time.monotonic()
        full, small = COMMANDS[name]
        limit = min(left, max(SHARE * left, AT_LEAST))
        part = run_part(name, small if args.small else full, device, limit)
        report["parts"][name] = part
        report["figures"] = figures(report["parts"])
        print(f"{name:16} {part['seconds']:5.0f} s  {part['status']}", flush=True)
        if args.json:
            make_directory(args.json.parent)
            write_json(args.json, report)
    for name, value in report["figures"].items():
        aim = f"  (aim {AIMS[name]})" if name in AIMS and not args.small else ""
        text = f"{value:.4g}" if isinstance(value, float) else value
        print(f"  {name:34} {text}{aim}")
    return report


def run_part(name: str, options: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """Runs a part for at most so many seconds.

    Returns:
        command, seconds, status ("done", "failed", "timed out" or "no time left"); of a benchmark that ended
        its report, else the last lines of the output.
    """
    part = {"command": options, "seconds": 0.0, "status": NO_TIME}
    if seconds <= 0:
        return part
    with tempfile.TemporaryDirectory() as folder:
        report, words = Path(folder, "report.json"), options.split()
        if name != "tests":
            words = ["-m", "dalle", "benchmark", *words, "--device", str(device), "--json", str(report)]
        output, started = Path(folder, "output.txt"), time.monotonic()
        with output.open("wb") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            child = subprocess.Popen([sys.executable, *words], cwd=PACKAGE.parent, **streams)
            try:
                part["status"] = "failed" if child.wait(seconds) else "done"
            except subprocess.TimeoutExpired:
                part["status"] = TIMED_OUT
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        part["seconds"] = time.monotonic() - started
        if report.is_file():
            return part | {"report": read_json(report)}
        return part | {"output": output.read_text(encoding="utf-8", errors="replace")[-OUTPUT:]}


def figures(parts: dict[str, Any]) -> dict[str, Any]:
    """The figures of the parts that are there, by name."""
    reports = {name: part["report"] for name, part in parts.items() if "report" in part}
    results: dict[str, Any] = {}
    if "tests" in parts:
        lines = parts["tests"].get("output", "").strip().split("\n")
        results["tests"] = lines[-1].strip("= ") or parts["tests"]["status"]
    if rates := reports.get("rates"):
        for name, line in rates["results"].items():
            results |= {f"{name.replace(' ', '_')}_{unit}": value for unit, value in line.items()}
    if train := reports.get("train-1.3b"):
        line = train["results"]["auto"]
        results["train_1.3b_tokens_per_sec"] = line["tokens_per_sec"]
        if "mfu" in line:
            results["train_1.3b_mfu"] = line["mfu"]
        results["train_1.3b_peak_over_plan"] = train["peak_memory_gib"] / train["planned_memory_gib"]
    for size in ("12b", "1.3b"):
        line = reports.get(f"sample-{size}", {}).get("results", {}).get("batch 1", {})
        if "seconds_per_image" in line:
            results[f"sample_{size}_seconds_per_image"] = line["seconds_per_image"]
            if "copy_bytes_per_sec" in results:
                share = line["weight_bytes_per_sec"] / results["copy_bytes_per_sec"]
                results[f"sample_{size}_copy_share"] = share
    candidates = reports.get("candidates-12b", {}).get("results", {}).values()
    fitting = [line for line in candidates if "seconds_per_image" in line]
    for line in fitting:
        results[f"candidates_12b_per_sec_batch_{line['batch']}"] = 1 / line["seconds_per_image"]
    if fitting:
        results["best_of_512_seconds"] = 512 * min(line["seconds_per_image"] for line in fitting)
    if attention := reports.get("attention"):
        for backend, line in attention["results"].items():
            speedups = {name: value for name, value in line.items() if name.startswith("speedup")}
            results |= {f"attention_{backend}_{name}": value for name, value in speedups.items()}
    for kind, line in reports.get("families", {}).get("results", {}).items():
        results |= {f"{kind}_{name}": value for name, value in line.items()}
    return results

"""Throughput of a run: seconds a step, share spent waiting for data, samples and tokens a second, MFU.

Rates are over all steps since the last line of the log, without evaluations and checkpoints. MFU, model
FLOP/s utilization, is the FLOPs that the model needs / seconds / peak FLOP/s of the device.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dalle.train.config import PEAK_FLOPS
from dalle.train.loggers import Numbers, peak_memory
from dalle.types import StepCost


def known_peak_flops(name: str, precision: str) -> float | None:
    """Peak FLOP/s in bf16 or fp16 of a GPU by its name in torch; None if unknown, and for fp32."""
    words = f" {name} ".replace("-", " ")
    return next((f for gpu, f in PEAK_FLOPS.items() if f" {gpu} " in words and precision != "fp32"), None)


def peak_flops(device: torch.device, precision: str, given: float | None = None) -> float | None:
    """Peak FLOP/s of a device: `given`, else by its name."""
    if given is None and device.type == "cuda":
        return known_peak_flops(torch.cuda.get_device_name(device), precision)
    return given


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOP/s utilization."""
    return flops / seconds / peak


class ThroughputMeter:
    """Times the steps of a run.

    Args:
        device: whose peak memory is reported.
        processes: train together, each with as many samples.
        peak: its peak FLOP/s; without it there is no MFU.
    """

    def __init__(self, device: torch.device, processes: int = 1, peak: float | None = None):
        self.device, self.processes, self.peak = device, processes, peak
        self._reset()

    def _reset(self) -> None:
        self.started, self.steps = time.perf_counter(), 0
        self.waited = self.paused = 0.0
        self.samples = self.tokens = 0
        self.flops = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times waiting for a batch."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out evaluations and checkpoints."""
        started = time.perf_counter()
        yield
        self.paused += time.perf_counter() - started

    def step(self, cost: StepCost | None) -> None:
        """Counts a step and its cost in this process."""
        self.steps += 1
        if cost:
            self.samples += cost.samples
            self.tokens += cost.tokens
            self.flops += cost.flops

    def lap(self) -> Numbers:
        """The rates since the last lap: samples and tokens of all processes, memory and MFU of this
        device."""
        seconds = max(time.perf_counter() - self.started - self.paused, 1e-9)
        numbers: Numbers = {
            "step_time": seconds / max(1, self.steps),
            "data_time_frac": self.waited / seconds,
            "max_memory_gib": peak_memory(self.device),
        }
        if self.samples:
            numbers["samples_per_sec"] = self.processes * self.samples / seconds
        if self.tokens:
            numbers["tokens_per_sec"] = self.processes * self.tokens / seconds
        if self.flops and self.peak:
            numbers["mfu"] = mfu(self.flops, seconds, self.peak)
        self._reset()
        return numbers

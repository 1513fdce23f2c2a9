"""How fast a run is: seconds of an update, share spent waiting for data, samples and tokens a second,
utilisation.

Every rate is over all updates since the last line of the log, without evaluations and checkpoints.

    MFU, model FLOP/s utilisation = operations that the model needs / seconds / peak FLOP/s of the device
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dalle.train.config import PEAK_FLOPS
from dalle.train.loggers import Numbers, peak_memory
from dalle.types import StepCost


def known_peak_flops(name: str, precision: str) -> float | None:
    """The peak of a GPU by the name torch gives it, in bf16 or fp16; None for others, and for fp32."""
    words = f" {name} ".replace("-", " ")
    return next((f for gpu, f in PEAK_FLOPS.items() if f" {gpu} " in words and precision != "fp32"), None)


def peak_flops(device: torch.device, precision: str, given: float | None = None) -> float | None:
    """The peak FLOP/s of a device: what is given, else what is known of it."""
    if given is None and device.type == "cuda":
        return known_peak_flops(torch.cuda.get_device_name(device), precision)
    return given


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOP/s utilisation, see above."""
    return flops / seconds / peak


class ThroughputMeter:
    """The clock of a run.

    Args:
        device: whose memory is told.
        processes: how many train together, each with as much work.
        peak: its peak FLOP/s; without it there is no utilisation.
    """

    def __init__(self, device: torch.device, processes: int = 1, peak: float | None = None):
        self.device, self.processes, self.peak = device, processes, peak
        self._reset()

    def _reset(self) -> None:
        self.started, self.updates = time.perf_counter(), 0
        self.waited = self.paused = 0.0
        self.samples = self.tokens = 0
        self.flops = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around getting a batch."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no training."""
        started = time.perf_counter()
        yield
        self.paused += time.perf_counter() - started

    def update(self, work: StepCost | None) -> None:
        """An update was made, of this work in this process."""
        self.updates += 1
        if work:
            self.samples += work.samples
            self.tokens += work.tokens
            self.flops += work.flops

    def lap(self) -> Numbers:
        """The rates since the last lap; all processes' samples and tokens, this device's utilisation."""
        seconds = max(time.perf_counter() - self.started - self.paused, 1e-9)
        numbers: Numbers = {
            "step_time": seconds / max(1, self.updates),
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

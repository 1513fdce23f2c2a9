"""Profile of some training steps: a Chrome trace and a table of the ten longest operations."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROWS = 10


class StepProfiler(AbstractContextManager):
    """Runs torch's profiler from step `first` to step `last`, both counted from 1; (0, 0) profiles nothing.

    Writes profile-FIRST-LAST.json, for chrome://tracing or https://ui.perfetto.dev, and the table as
    profile-FIRST-LAST.txt into the directory.
    """

    def __init__(self, steps: tuple[int, int], folder: Path):
        self.first, self.last = steps
        self.folder, self.profile = folder, None

    def start_step(self, step: int) -> None:
        """Call before a step; starts the profiler at the first one, or later if a run is resumed there."""
        if self.profile is None and self.first <= step <= self.last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.start()

    def end_step(self, step: int) -> None:
        """Call after a step; writes the files after the last one."""
        if self.profile is not None and step == self.last:
            self._stop()
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = self.profile.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
            path = self.folder / f"profile-{self.first}-{self.last}.json"
            self.profile.export_chrome_trace(str(path))
            path.with_suffix(".txt").write_text(table, encoding="utf-8")
            tqdm.write(f"{table}\n{path}: open it in chrome://tracing or https://ui.perfetto.dev")
            self.first, self.last, self.profile = 0, 0, None

    def _stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.profile.stop()

    def __exit__(self, *error: Any) -> None:
        if self.profile is not None:
            self._stop()

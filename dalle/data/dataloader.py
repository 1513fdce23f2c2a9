"""Batches ahead of time: worker processes compute the batch of a step while the model is at work.

What a worker is given is the number of a step, and a batch is a function of (seed, step). So any number of
workers, and any resume, gives the same next batch; there is no state to keep and no buffer to fill.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dalle.data.bad_samples import BadSampleLog
from dalle.data.sampler import batch_indices
from dalle.types import BadSample, CaptionedImages, ImageTextBatch

PATIENCE = 600
"""Seconds without a batch after which a worker is given up."""
WATCHED_EVERY = 2.0
"""Seconds after which a worker looks again whether its training is still there."""


@dataclass(frozen=True)
class StepOfPairs:
    """What a worker does: reads the samples of a step and makes a batch of them.

    Calling it gives (batch, what was skipped).
    """

    pairs: CaptionedImages
    """Where the samples come from."""
    batch_size: int
    """Samples in a step, over all processes."""
    seed: int
    """Of order and crops."""
    augment: str
    """The listing that crops."""
    finish: Callable[[ImageTextBatch, int], Any]
    """(pairs, step) -> batch; a function or object that another process can import."""
    rank: int = 0
    """Which of the training processes."""
    world: int = 1
    """Of how many."""

    def __call__(self, step: int) -> tuple[Any, list[BadSample]]:
        samples = batch_indices(step, self.batch_size, self.pairs.size, self.seed, self.rank, self.world)
        batch = self.pairs.load(samples, self.augment, self.seed, replace=True)
        return self.finish(batch, step), batch.skipped


class Loader:
    """The batch of a step, computed in this process or ahead of time in others.

    Use it as a context, so that the workers end with it; step after step is what they are ahead of, and any other
    step starts them anew.

    Args:
        make: step -> item, the same for the same step; with workers, it must be picklable where processes are
            spawned.
        steps: no step beyond is prepared.
        workers: processes; 0 for none.
        prefetch: items that each worker keeps ready.
        receive: (step, item) -> batch, here.
        start_method: "fork", "spawn", "forkserver"; the system's own unless given.
        pin: put tensors into memory from which a CUDA device copies quickly.
        patience: seconds to wait for an item.

    Raises:
        ValueError: what `make` raised, without the worker's traceback.
        RuntimeError: a worker died, or has hung for as long as the patience lasts; names its process.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        steps: int,
        workers: int = 0,
        prefetch: int = 2,
        receive: Callable[[int, Any], Any] = lambda step, item: item,
        start_method: str | None = None,
        pin: bool = False,
        patience: float = PATIENCE,
    ):
        self.make, self.steps, self.workers, self.prefetch = make, steps, workers, prefetch
        self.receive, self.start_method, self.pin, self.patience = receive, start_method, pin, patience
        self._stream: Any = None
        self._first = self._next = -1

    def __call__(self, step: int) -> Any:
        item = self._take(step) if self.workers and step < self.steps else self.make(step)
        return self.receive(step, item)

    def _take(self, step: int) -> Any:
        if self._stream is None or step != self._next:
            self.close()
            self._first = step
            self._stream = iter(
                DataLoader(
                    _Steps(self.make),
                    batch_size=None,
                    sampler=range(step, self.steps),
                    num_workers=self.workers,
                    prefetch_factor=self.prefetch,
                    timeout=self.patience,
                    multiprocessing_context=self.start_method,
                    pin_memory=self.pin,
                    collate_fn=_as_it_is,
                    worker_init_fn=partial(_serve, os.getpid()),
                    generator=torch.Generator(),  # else starting workers would draw from the one of the training
                )
            )
        try:
            item = next(self._stream)
        except RuntimeError as error:
            said = str(error).splitlines()[0] if "DataLoader" in str(error) else str(error)
            if "timed out" in said:  # the workers take turns
                number = (step - self._first) % self.workers
                said = f"worker {number} (pid {self._stream._workers[number].pid}) hangs: nothing in {self.patience} s."
            self.close()
            raise RuntimeError(
                f"the data of step {step + 1} did not come: {said} A worker that is killed mostly lacks memory: lower "
                "--data.workers or --data.prefetch, in a container give more shared memory (docker --shm-size), and "
                "with --data.workers 0 an error shows where it is made"
            ) from error
        if isinstance(item, _Mistake):
            self.close()
            raise ValueError(item.said)
        self._next = step + 1
        return item

    def close(self) -> None:
        """Ends the workers, also those that hang; the next step starts them anew."""
        stream, self._stream, self._next = self._stream, None, -1
        if stream is not None:
            stream._shutdown_workers()
            for worker in stream._workers:
                worker.kill()
                worker.join()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


class PairsLoader(Loader):
    """The batches of pairs; what is skipped goes to `skipped`, which is told at the end.

    Args:
        task: what a worker does.
        steps: no step beyond is prepared.
        workers: as in PairsConfig: -1 takes as many as serve.
        prefetch: items that each worker keeps ready.
        log: names what is skipped; None only counts. Of several processes each writes its own, skipped-RANK.jsonl
            after the first, and what opening found is told by the first alone.
        max_bad_fraction: the share above which a run ends; each process judges by what it has read itself.
        receive: turns what `task.finish` made into a batch, in this process.
        pin: as in Loader.
    """

    def __init__(
        self,
        task: StepOfPairs,
        steps: int,
        workers: int = 0,
        prefetch: int = 2,
        log: Path | None = None,
        max_bad_fraction: float = 0.01,
        receive: Callable[[Any], Any] = lambda made: made,
        pin: bool = False,
    ):
        opening: Sequence[BadSample] = () if task.rank else getattr(task.pairs, "skipped", ())
        if log and task.rank:
            log = log.with_stem(f"{log.stem}-{task.rank}")
        self.skipped = BadSampleLog(log, task.pairs.size, opening, max_bad_fraction)

        def take(step: int, item: tuple[Any, list[BadSample]]) -> Any:
            made, skips = item
            self.skipped.add(skips, step, (step + 1) * task.batch_size // task.world, replaced=True)
            return receive(made)

        super().__init__(task, steps, worker_count(workers, task.pairs.size), prefetch, take, pin=pin)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.skipped.counts:
            tqdm.write(f"note: {self.skipped}")


def worker_count(asked: int, size: int | None) -> int:
    """As many as asked for; for -1 one for each core that this process may use but one, eight at most, and none for
    an endless set (size None), which is drawn and not read. Processes that torchrun starts share a machine's cores."""
    if asked >= 0:
        return asked
    if size is None:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def _serve(training: int, worker: int) -> None:
    """A scheduler and a terminal signal every process at once; a worker that obeyed would take the training with it
    before it has saved. It ends with the loader, or when the training process, of that pid, is gone."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if os.name == "posix":  # torch watches the parent, which under forkserver is not the training
        threading.Thread(target=_end_with, args=(training,), daemon=True).start()


def _end_with(training: int) -> None:
    """Ends this process within seconds after that one is gone."""
    while True:
        time.sleep(WATCHED_EVERY)
        try:
            os.kill(training, 0)
        except ProcessLookupError:
            os._exit(1)
        except PermissionError:  # it is there, and another user's
            pass


def _as_it_is(item: Any) -> Any:
    """In place of torch's own, which makes lists of tuples and tensors of numbers."""
    return item


@dataclass(frozen=True)
class _Mistake:
    """A ValueError on its way out of a worker."""

    said: str


@dataclass(frozen=True)
class _Steps(Dataset):
    """Steps as torch's DataLoader wants them: numbered items."""

    make: Callable[[int], Any]

    def __getitem__(self, step: int) -> Any:
        try:
            return self.make(step)
        except ValueError as error:
            return _Mistake(str(error))

"""Dataloader: torch's DataLoader over training steps, so that a resume needs no state.

The batch of a step is a function of (seed, step). Workers receive step numbers and return whole batches, so
any number of workers and any resume give the same next batch, and no buffer has to be refilled.
"""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dalle.data.bad_samples import BadSampleLog
from dalle.data.sampler import batch_indices
from dalle.types import BadSample, CaptionedImages, ImageTextBatch

WORKER_TIMEOUT = 600
"""Seconds without a batch after which a worker is ended as hanging."""


@dataclass(frozen=True)
class BatchReader:
    """Step -> (batch, bad samples), for the workers."""

    dataset: CaptionedImages
    batch_size: int
    """Samples of a step over all processes."""
    seed: int
    augment: str
    """The listing of the random crops, or "none"."""
    collate: Callable[[ImageTextBatch, int], Any]
    """(samples, step) -> batch; importable by another process."""
    rank: int = 0
    world: int = 1

    def __call__(self, step: int) -> tuple[Any, list[BadSample]]:
        samples = batch_indices(step, self.batch_size, self.dataset.size, self.seed, self.rank, self.world)
        batch = self.dataset.load(samples, self.augment, self.seed, replace=True)
        return self.collate(batch, step), batch.skipped


class Loader(AbstractContextManager):
    """The item of a step, computed in this process or ahead of time by workers, which end with the context.

    Consecutive steps are prefetched; any other step restarts the workers.

    Args:
        make: step -> item, deterministic, and picklable where processes are spawned.
        steps: no later step is prefetched.
        workers: number of worker processes; 0 for none.
        prefetch: items that each worker keeps ready.
        pin: pin the memory of tensors for fast copies to a CUDA device.
        timeout: seconds to wait for an item.

    A ValueError of `make` comes without the traceback of the worker; a RuntimeError names a worker that died
    or hangs.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        steps: int,
        workers: int = 0,
        prefetch: int = 2,
        pin: bool = False,
        timeout: float = WORKER_TIMEOUT,
    ):
        self.make, self.steps, self.workers, self.timeout = make, steps, workers, timeout
        self._options = {"prefetch_factor": prefetch, "pin_memory": pin, "timeout": timeout}
        self._stream: Any = None
        self._first = self._next = -1

    def __call__(self, step: int) -> Any:
        if not self.workers or step >= self.steps:
            return self.make(step)
        if self._stream is None or step != self._next:
            self.close()
            self._first = step
            self._stream = iter(
                DataLoader(
                    range(self.steps),
                    batch_size=None,  # an item is a whole batch
                    sampler=range(step, self.steps),
                    collate_fn=partial(_try, self.make),
                    num_workers=self.workers,
                    worker_init_fn=_init_worker,
                    generator=torch.Generator(),  # leaves the global generator alone
                    **self._options,
                )
            )
        try:
            item = next(self._stream)
        except RuntimeError as error:
            problem = str(error).partition("\n")[0]
            if problem.startswith("Caught "):  # by torch, in a worker that lives: it has the traceback
                raise
            if "timed out" in problem:
                number = (step - self._first) % self.workers  # the workers take turns
                pid = self._stream._workers[number].pid
                problem = f"worker {number} (pid {pid}) hangs: nothing in {self.timeout} s."
            self.close()
            raise RuntimeError(
                f"no data for step {step + 1}: {problem} A killed worker mostly lacks memory: lower "
                "--data.workers or --data.prefetch, in a container raise shared memory (docker --shm-size); "
                "--data.workers 0 shows a traceback"
            ) from error
        if isinstance(item, ValueError):
            self.close()
            raise item
        self._next = step + 1
        return item

    def close(self) -> None:
        """Ends the workers, hanging ones included; the next step starts new ones."""
        stream, self._stream, self._next = self._stream, None, -1
        if stream is not None:
            stream._shutdown_workers()
            for worker in stream._workers:
                worker.kill()
                worker.join()

    def __exit__(self, *error: Any) -> None:
        self.close()


class ImageTextLoader(Loader):
    """Batches of captioned images; bad samples are counted in `bad_samples` and printed at the end.

    Args:
        reader, steps, prefetch, pin: as in Loader.
        workers: as in DataConfig; -1 chooses.
        log: file of bad samples; None only counts. Rank 1 writes NAME-1.jsonl, and so on; bad samples found
            while opening the dataset are in the file of rank 0 alone.
        max_bad_fraction: of the samples that this process has read; more end a run.
        receive: converts a batch in the training process.
    """

    def __init__(
        self,
        reader: BatchReader,
        steps: int,
        workers: int = 0,
        prefetch: int = 2,
        log: Path | None = None,
        max_bad_fraction: float = 0.01,
        receive: Callable[[Any], Any] | None = None,
        pin: bool = False,
    ):
        opening: Sequence[BadSample] = () if reader.rank else getattr(reader.dataset, "skipped", ())
        if log and reader.rank:
            log = log.with_stem(f"{log.stem}-{reader.rank}")
        self.reader, self.receive = reader, receive
        self.bad_samples = BadSampleLog(log, reader.dataset.size, opening, max_bad_fraction)
        super().__init__(reader, steps, worker_count(workers, reader.dataset.size), prefetch, pin=pin)

    def __call__(self, step: int) -> Any:
        batch, skipped = super().__call__(step)
        seen = (step + 1) * self.reader.batch_size // self.reader.world
        self.bad_samples.add(skipped, step, seen, replaced=True)
        return self.receive(batch) if self.receive else batch

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.bad_samples.counts:
            tqdm.write(f"note: {self.bad_samples}")


def worker_count(workers: int, size: int | None) -> int:
    """The number of workers; -1 becomes one for each core but one, eight at most, none for an endless set."""
    if workers >= 0:
        return workers
    if size is None:
        return 0
    # the processes of torchrun share the cores of their machine
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def _init_worker(worker: int) -> None:
    """Ignores signals, which schedulers and terminals send to every process: the training saves first.

    A worker ends with its loader, or with the training process.
    """
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if os.name == "posix":  # torch watches the parent, which under forkserver is not the training
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    torch.multiprocessing.parent_process().join()  # the training, ended, also before it is waited for
    os._exit(1)


def _try(make: Callable[[int], Any], step: int) -> Any:
    """What a worker returns: an item or a ValueError."""
    try:
        return make(step)
    except ValueError as error:
        return ValueError(str(error))

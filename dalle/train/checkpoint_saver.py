"""Run lifecycle: directory lock, asynchronous checkpoints, graceful shutdown on a signal."""

import errno
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from tqdm import tqdm

from dalle.config import DISK_ERRORS
from dalle.io.files import make_directory
from dalle.train.checkpoint import Snapshot, latest_checkpoint, write_checkpoint
from dalle.train.config import TrainConfig
from dalle.train.distributed import Distributed
from dalle.train.state import TrainState

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONTINUE, STOP, FAILED = range(3)


class AsyncCheckpointer:
    """Writes checkpoints in a thread while training continues, one at a time."""

    def __init__(self, run_dir: Path, keep_last: int, keep_every: int | None):
        self.run_dir, self.keep_last, self.keep_every = run_dir, keep_last, keep_every
        self.control = Distributed.current()  # the thread's own
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: tuple[int, Future] | None = None

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Copies the state and starts writing it, after the previous checkpoint is written."""
        self.wait()
        snapshot = Snapshot.of(state, meta, self.control.rank)
        written = self.thread.submit(
            write_checkpoint, self.run_dir, snapshot, self.keep_last, self.keep_every, self.control
        )
        self.writing = state.step, written

    @property
    def failed(self) -> bool:
        """Whether the checkpoint could not be written; `wait` raises the reason."""
        return bool(self.writing and self.writing[1].done() and self.writing[1].exception())

    def wait(self) -> None:
        """Waits until the checkpoint is written; OSError says what a resume would start from if it failed."""
        if self.writing is None:
            return
        (step, written), self.writing = self.writing, None
        try:
            written.result()
        except OSError as error:
            last = latest_checkpoint(self.run_dir, ())
            earlier = f"{last} is intact" if last else "there is no earlier one"
            place, number = error.filename2 or error.filename, error.errno
            cause = f"{error.strerror or error}"
            if number not in DISK_ERRORS:  # something is in the way of a file
                number, cause = errno.EIO, f"{cause}: {place}" if place else cause
            raise OSError(
                number,
                f"cannot write the checkpoint of step {step} ({cause}); {earlier}. "
                "Free disk space (train.keep_last + 1 checkpoints must fit) and run the same command again",
            ) from error


class RunGuard(AbstractContextManager):
    """Context of a training: locks the run's directory, handles signals, saves checkpoints.

    ValueError if the directory cannot be written to, or is in use by another process.
    """

    def __init__(self, run_dir: Path, meta: dict[str, Any], config: TrainConfig):
        self.run_dir, self.meta, self.save_every = run_dir, meta, config.save_every
        self.control = Distributed.current()
        self.lock: TextIO | None = None
        self.control.on_main(self._lock)
        self.checkpointer = AsyncCheckpointer(run_dir, config.keep_last, config.keep_every)
        self.stop = PreemptionHandler()

    def _lock(self) -> None:
        self.lock = lock_directory(self.run_dir)

    def on_step_end(self, state: TrainState) -> None:
        """Saves a checkpoint if one is due, or a signal asked any process to stop: then raises Preempted."""
        last = state.step == self.meta["steps"]
        own = FAILED if self.checkpointer.failed else STOP if self.stop.asked else CONTINUE
        status = self.control.max(own)
        if status == FAILED:
            self.checkpointer.wait()
        if status == STOP or last or state.step % self.save_every == 0:
            self.checkpointer.save(state, self.meta)
        if status == STOP and not last:
            self.checkpointer.wait()
            if self.control.is_main:
                cause = self.stop.asked or "a signal to another process"
                tqdm.write(
                    f"{self.meta['kind']}: stopped by {cause} after step {state.step} of "
                    f"{self.meta['steps']}, saved in {latest_checkpoint(self.run_dir, ())}; the same command "
                    f"resumes it (exit status {EXIT_PREEMPTED})"
                )
            raise Preempted(EXIT_PREEMPTED)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.checkpointer.wait()
        except OSError as failure:
            if error is None and self.run_dir.is_dir():
                raise
            tqdm.write(f"warning: {failure.strerror}")  # the error that ended the run is raised
        finally:
            self.checkpointer.thread.shutdown()
            self.stop.close()
            if self.lock:
                self.lock.close()
        if (error is None or isinstance(error, OSError)) and not self.run_dir.is_dir():
            raise ValueError(
                f"{self.run_dir} was moved or removed during the training; move it back and run again"
            ) from None


LOCK = ".lock"


def lock_directory(run_dir: Path, name: str = LOCK) -> TextIO:
    """Makes a run's directory and holds its lock until the file is closed or the process ends.

    The file names the process and its host. The kernel frees a record lock when its process dies, and forked
    data workers do not inherit it. Windows has none: nothing is locked there.
    """
    make_directory(run_dir)
    file = (run_dir / name).open("a+", encoding="utf-8")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"note: {run_dir} cannot be locked ({error.strerror}); let no other run write there")
            return file
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{run_dir} is in use by {holder}; wait for it, or give another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


@contextmanager
def partial_directory(folder: Path) -> Iterator[Path]:
    """A folder of one process for unfinished files, without those of a killed one; removed at the end."""
    with lock_directory(folder):
        try:
            for leftover in folder.iterdir():
                if leftover.name != LOCK:
                    leftover.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


EXIT_PREEMPTED = 75
NAMES = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
SAME_PRESS = 1.0
"""Seconds in which a second SIGINT is an echo of the first: torchrun passes on what the terminal has sent."""


class Preempted(SystemExit):
    """A run stopped by a signal before its last step; a script exits with status 75."""


class PreemptionHandler:
    """Sets `asked` to the name of a signal to stop; outside of the main thread Python delivers none."""

    def __init__(self):
        self.asked: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)  # nohup ignores SIGHUP

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and number == signal.SIGINT and now - self._since > SAME_PRESS:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._since = signal.Signals(number).name, now

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's own

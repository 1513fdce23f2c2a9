"""What keeps a run alive: one process in its directory, checkpoints in the background, an end in order when asked."""

import errno
import os
import signal
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from tqdm import tqdm

from dalle.io.files import make_directory
from dalle.train.checkpoint import Snapshot, latest_checkpoint, write_checkpoint
from dalle.train.ranks import Ranks
from dalle.train.state import TrainState

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

GO, STOP, FAILED = range(3)


class Saver:
    """Checkpoints written by a thread while training goes on, one at a time.

    Args:
        run_dir: the run's directory.
        keep: newest checkpoints kept.
        keep_every: steps whose multiples are kept besides, or None.
    """

    def __init__(self, run_dir: Path, keep: int, keep_every: int | None):
        self.run_dir, self.keep, self.keep_every = run_dir, keep, keep_every
        self.ranks = Ranks()  # the thread's own
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: tuple[int, Future] | None = None

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Copies the state and begins to write it, once the checkpoint before is written."""
        self.wait()
        snapshot = Snapshot.of(state, meta, self.ranks.rank)
        written = self.thread.submit(
            write_checkpoint, self.run_dir, snapshot, self.keep, self.keep_every, self.ranks
        )
        self.writing = state.step, written

    @property
    def failed(self) -> bool:
        """Whether the checkpoint could not be written; `wait` says why."""
        return self.writing is not None and self.writing[1].done() and self.writing[1].exception() is not None

    def wait(self) -> None:
        """Until the checkpoint is written.

        Raises:
            OSError: it could not be; says what is left to go on from.
        """
        if self.writing is None:
            return
        (step, written), self.writing = self.writing, None
        try:
            written.result()
        except OSError as error:
            last = latest_checkpoint(self.run_dir)
            left = (
                f"{last} is whole, and the same command goes on from it"
                if last
                else "there is none before it"
            )
            raise OSError(
                error.errno or errno.EIO,
                f"the checkpoint of step {step} could not be written ({error.strerror or error}): {left}. Make room "
                "(train.keep_last and one checkpoints must fit) or mend the disk first",
            ) from error


class Keeper:
    """A context around a training: holds the directory, hears signals, saves, and has all saved when it ends.

    Args:
        run_dir: the run's directory, made where there is none.
        meta: what makes a checkpoint describe itself.
        steps: updates in all.
        save_every: updates between two checkpoints; the last step is always saved.
        keep: newest checkpoints kept.
        keep_every: steps whose multiples are kept besides, or None.

    Raises:
        ValueError: the directory cannot be written to, or another process is at work in it.
    """

    def __init__(
        self,
        run_dir: Path,
        meta: dict[str, Any],
        steps: int,
        save_every: int,
        keep: int,
        keep_every: int | None,
    ):
        self.run_dir, self.meta, self.steps, self.save_every = (
            run_dir,
            meta | {"steps": steps},
            steps,
            save_every,
        )
        self.ranks = Ranks()
        self.lock = RunLock(run_dir)
        self.ranks.first(self._enter_directory)
        self.saver = Saver(run_dir, keep, keep_every)
        self.stop = StopRequest()

    def _enter_directory(self) -> None:
        make_directory(self.run_dir)
        self.lock.take()

    def after_step(self, state: TrainState) -> None:
        """Saves if it is time to, or if a signal asked any of the processes to stop.

        Raises:
            Stopped: a signal asked, and the training is not complete; it is saved.
            OSError: a checkpoint could not be written.
        """
        last = state.step == self.steps
        word = self.ranks.highest(FAILED if self.saver.failed else STOP if self.stop.asked else GO)
        if word == FAILED:
            self.saver.wait()
        if word == STOP or last or state.step % self.save_every == 0:
            self.saver.save(state, self.meta)
        if word == STOP and not last:
            self.saver.wait()
            if self.ranks.rank == 0:
                asked = self.stop.asked or "a signal to another process"
                tell_stopped(
                    self.meta["kind"], asked, state.step, self.steps, latest_checkpoint(self.run_dir)
                )
            raise Stopped

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.saver.wait()
        except OSError as failure:
            if error is None:
                raise
            tqdm.write(f"warning: {failure.strerror}")  # what ended the run is the first to be told
        finally:
            self.saver.thread.shutdown()
            self.stop.close()
            self.lock.close()


class RunLock:
    """<run>/.lock, which names the process that holds it and its host.

    A record lock (`fcntl.lockf`): the kernel frees it when its process dies, a forked data worker that outlives the
    process does not inherit it, and network file systems know it. Where the system has none, nothing is locked.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.file: TextIO | None = None

    def take(self) -> None:
        """Holds the directory until `close`, or until the process ends.

        Raises:
            ValueError: another process holds it.
        """
        self.file = (self.run_dir / ".lock").open("a+", encoding="utf-8")
        try:
            if fcntl:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._refused(error)
        else:
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self.file.flush()

    def _refused(self, error: OSError) -> None:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(
                f"note: {self.run_dir} cannot be locked ({error.strerror}); see that no other run writes there"
            )
            return
        self.file.seek(0)
        holder = self.file.read().strip() or "another process"
        self.close()
        raise ValueError(f"{self.run_dir} is in use by {holder}; wait until it ends, or give another --out")

    def close(self) -> None:
        """Frees the directory."""
        if self.file:
            self.file.close()


TRY_AGAIN = 75
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
SAME_PRESS = 1.0
"""Seconds in which a second SIGINT is an echo: a launcher passes on what the terminal has sent already."""


class Stopped(SystemExit):
    """The end of a run that was asked to stop before it was complete; a script exits with status 75."""

    def __init__(self):
        super().__init__(TRY_AGAIN)


class StopRequest:
    """Listens for a signal to stop while it is open; `asked` is then the signal's name.

    Outside of the main thread it hears nothing, since Python gives signals to that one alone.
    """

    def __init__(self):
        self.asked: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and number == signal.SIGINT and now - self._since > SAME_PRESS:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._since = signal.Signals(number).name, now

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's own


def tell_stopped(kind: str, asked: str, step: int, steps: int, place: Any) -> None:
    """Says how to go on."""
    tqdm.write(
        f"{kind}: stopped by {asked} after step {step} of {steps}, saved in {place}. The training is not complete: "
        f"the same command goes on from there (exit status {TRY_AGAIN})"
    )

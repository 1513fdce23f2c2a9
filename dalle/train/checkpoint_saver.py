"""What keeps a run alive: one process in its directory, checkpoints in the background, an end in order when asked."""

import errno
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dalle.io.files import make_directory
from dalle.train.checkpoint import Snapshot, latest_checkpoint, write_checkpoint
from dalle.train.lock import RunLock
from dalle.train.ranks import Ranks
from dalle.train.signals import Stopped, StopRequest, tell_stopped
from dalle.train.state import TrainState

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
                "(train.keep and one checkpoints must fit) or mend the disk first",
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

"""A run that is asked to stop: it ends its step, saves, and exits with a status that no one takes for success.

    SIGTERM, SIGUSR1    a scheduler's: saved at the end of the step, exit status 75
    SIGINT (Ctrl-C)     the same; once more stops at once, and the last checkpoint counts
    anything else       as Python has it

75 is EX_TEMPFAIL of sysexits.h: try again. 0 means that the training is complete.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any

from tqdm import tqdm

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

"""One run in a directory at a time, by a lock that ends with the process however that ends."""

import errno
import os
import socket
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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

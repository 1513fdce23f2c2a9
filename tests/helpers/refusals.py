"""Commands that refuse their arguments."""

import re
from types import SimpleNamespace


def assert_refused(done: SimpleNamespace, message: str) -> None:
    """Exit status 1 and one line; a second line is a command, if any."""
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    commands = done.err.strip().splitlines()[1:]
    assert all(line.startswith("    python scripts/") for line in commands)
    assert re.search(message, done.err), done.err

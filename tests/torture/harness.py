"""Attempts at a reader in a child process: what is damaged is read right, left out or refused by name.

The child has a limit of memory, and an audit hook that sees programs started, connections, and writes
outside its folder. A child that dies or hangs costs one attempt, and another takes over.
"""

import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import torch

from tests.helpers.processes import FORKSERVER
from tests.torture.mutations import damage

READ, LEFT_OUT, REFUSED, FAILED = "read", "left out by name", "refused by name", "failed"
HANGS, MEMORY, LONGEST = 60, 3 * 2**30, 5000
"""Seconds and bytes of one attempt; characters of a message."""
PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn")
PROGRAMS += ("socket.connect", "socket.bind", "socket.getaddrinfo", "webbrowser.open")
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate")


@dataclass(frozen=True)
class Suite:
    """A reader and whole inputs of it.

    `make` writes the inputs, each a file or a folder, into a folder; `read(damaged, whole)` returns READ or
    LEFT_OUT, raises the ValueError of the library, or AssertionError for what was read wrong.
    """

    make: Callable[[Path, Path], None]
    read: Callable[[Path, Path], str]
    damage: Callable[[Path, Random], str] = damage


@dataclass
class Result:
    """Counts of outcomes, failures with their tracebacks, and the memory that was needed."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    mebibytes: int = 0


def torture(suite: Suite, place: Path, chain: Path, seed: str, seconds: float, first: int = 0) -> Result:
    """Attempts from number `first` on for so many seconds; `chain` is the fixture of that name."""
    result, number, end = Result(), first, None
    while end is None or time.monotonic() < end:
        receiver, sender = FORKSERVER.Pipe(duplex=False)
        child = FORKSERVER.Process(target=_work, args=(suite, place, chain, seed, number, sender))
        child.start()
        sender.close()
        problem = f"hung for {HANGS} s"
        try:
            while receiver.poll(HANGS):
                outcome, detail, result.mebibytes = receiver.recv()
                end = end or time.monotonic() + seconds  # preparations take no time of it
                number += 1
                result.counts[outcome] += 1
                if outcome == FAILED:
                    result.failures.append(detail)
                if time.monotonic() > end:
                    problem = ""
                    break
        except EOFError:
            child.join()
            problem = f"ended with status {child.exitcode}"
        child.kill()
        child.join()
        if problem:
            result.counts[FAILED] += 1
            result.failures.append(f"attempt {number}: the process {problem}")
            number += 1
            end = end or time.monotonic()
    return result


def _work(suite: Suite, place: Path, chain: Path, seed: str, first: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    shutil.rmtree(place, ignore_errors=True)
    (place / "whole").mkdir(parents=True)
    os.chdir(place)
    tempfile.tempdir = str(place)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        suite.make(place / "whole", chain)
        for whole in (place / "whole").iterdir():  # also imports all that is needed
            outcome, detail = _attempt(suite, whole, place, Random(0), lambda path, rng: "nothing", [])
            assert outcome == READ, f"{whole.name}, whole: {outcome} {detail}"
    forbidden: list[str] = []
    sys.addaudithook(lambda event, args: _audit(event, args, place, forbidden))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in count(first):
        rng = Random(f"{seed} {number}")
        whole = rng.choice(sorted((place / "whole").iterdir()))
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            outcome, detail = _attempt(suite, whole, place, rng, suite.damage, forbidden)
        if outcome == FAILED:
            shutil.copytree(place / "damaged", place / f"failed-{number}", symlinks=True, dirs_exist_ok=True)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        sender.send((outcome, f"attempt {number}: {whole.name}, {detail}", memory // 1024))


def _attempt(
    suite: Suite, whole: Path, place: Path, rng: Random, damage: Callable, forbidden: list[str]
) -> tuple[str, str]:
    """The outcome, and what failed."""
    shutil.rmtree(place / "damaged", ignore_errors=True)
    copy = place / "damaged" / whole.name
    copy.parent.mkdir()
    if whole.is_dir():
        shutil.copytree(whole, copy, ignore=shutil.ignore_patterns(".*"))  # indexes
    else:
        shutil.copy2(whole, copy)
    how = damage(copy, rng)
    forbidden.clear()
    started = time.monotonic()
    try:
        outcome, detail = suite.read(copy, whole), ""
    except ValueError as error:
        names = [str(copy), *(path.name for path in copy.rglob("*"))] if copy.is_dir() else [copy.name]
        named = any(name in str(error) for name in names) and len(str(error)) < LONGEST
        outcome, detail = REFUSED if named else FAILED, traceback.format_exc(limit=-2)
    except BaseException:
        outcome, detail = FAILED, traceback.format_exc(limit=-2)
    if forbidden:
        outcome, detail = FAILED, forbidden[0]
    if time.monotonic() - started > HANGS / 2:
        outcome, detail = FAILED, f"took {time.monotonic() - started:.0f} s"
    return outcome, f"{how}:\n{detail[-3000:]}"


def _audit(event: str, args: tuple, place: Path, forbidden: list[str]) -> None:
    """Notes programs, connections, and changes outside the place."""
    path, changes = args[0] if args else None, event in CHANGES
    if event == "open":
        changes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if changes and isinstance(path, str | bytes | os.PathLike):
        absolute = os.path.realpath(os.fsdecode(path))
        relative = event != "open" and isinstance(args[-1], int) and args[-1] > 0  # below an open folder
        changes = not relative and not f"{absolute}/".startswith((f"{place}/", "/dev/"))
    else:
        changes = False
    if changes or event in PROGRAMS:
        forbidden.append(f"{event} {args!s:.200}")

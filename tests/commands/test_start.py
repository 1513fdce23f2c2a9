"""Start-up of every command: --help and a bad flag answer without importing torch."""

import json

import pytest

from dalle.cli import COMMANDS

HEAVY = ("torch", "numpy", "PIL", "matplotlib", "open_clip", "einops")
CODE = """
import contextlib, io, json, sys
from dalle.cli import main
heavy = {}
for name in sys.argv[1].split():
    for words in (["--help"], ["--no-such-flag"], FIRST.get(name, []) + ["--help"]):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                main([name, *words])
            except SystemExit:
                pass
        found = [module for module in HEAVY if module in sys.modules]
        if found and name not in heavy:
            heavy[name] = found
print(json.dumps(heavy))
"""
FIRST = {"benchmark": ["train"], "plan": ["--kind", "dvae"], "lr-sweep": ["1", "--kind", "dvae"]}


@pytest.fixture(scope="module")
def imported(python, tmp_path_factory) -> dict[str, list[str]]:
    """Heavy modules that a process has imported after the help of each command, in order."""
    code = f"FIRST, HEAVY = {FIRST!r}, {HEAVY!r}\n{CODE}"
    done = python(["-c", code, " ".join(COMMANDS)], cwd=tmp_path_factory.mktemp("start"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_and_bad_flags_import_nothing_heavy(imported):
    assert imported == {}

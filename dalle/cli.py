"""The command `dalle`: one word for each script, from any directory, also where only the wheel is installed.

    dalle train-dvae --steps 100                         as python scripts/train_dvae.py --steps 100
    torchrun --nproc-per-node 8 -m dalle encode-images   as torchrun --nproc-per-node 8 scripts/encode_images.py

The script itself is run, so both forms have the same words. `dalle --help` reads the first line of each script and
imports none of them.
"""

import ast
import difflib
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from dalle import __version__
from dalle.shipped import COMMAND, SCRIPTS, program

COMMANDS = {
    "quickstart": "everything at once",
    "check-data": "data",
    "convert-captions": "data",
    "write-tars": "data",
    "train-tokenizer": "train, in this order",
    "train-dvae": "train, in this order",
    "encode-images": "train, in this order",
    "train-transformer": "train, in this order",
    "train-clip": "train, in this order",
    "sample": "use and measure",
    "evaluate": "use and measure",
    "inspect-checkpoint": "use and measure",
    "plot": "use and measure",
    "plan": "plan a training",
    "sweep": "plan a training",
    "benchmark": "plan a training",
}
"""Each command, under the heading where --help lists it. scripts/train_dvae.py is the script of train-dvae."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs `dalle` with these words (the process's own unless given); the exit status, 2 for a command it lacks.

    A command that ends the process (a mistake of the user, a training that was stopped) raises SystemExit as its
    script does.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(listing())
    elif words[0] == "--version":
        print(f"{COMMAND} {__version__}")
    elif (name := words[0].replace("_", "-")) in COMMANDS:
        sys.argv = [program(name), *words[1:]]
        _run(script_of(name))
    else:
        print(_unknown(words[0]), file=sys.stderr)
        return 2
    return 0


def script_of(name: str) -> Path:
    """The file that a command runs."""
    return SCRIPTS / f"{name.replace('-', '_')}.py"


def summary(name: str) -> str:
    """The first line of a command's script."""
    text = ast.get_docstring(ast.parse(script_of(name).read_text(encoding="utf-8")))
    return text.splitlines()[0]


def listing() -> str:
    """What `dalle --help` prints: each command with one line, under its heading."""
    lines = [f"usage: {COMMAND} COMMAND [words]", "", "Train DALL-E, draw with it, measure it."]
    width = max(map(len, COMMANDS))
    heading = None
    for name, its_heading in COMMANDS.items():
        if its_heading != heading:
            heading = its_heading
            lines += ["", f"{heading}:"]
        lines.append(f"  {name:{width}}  {summary(name)}")
    lines += [
        "",
        f"`{COMMAND} COMMAND --help` explains every word of a command; `{COMMAND} --version` says which this is.",
    ]
    return "\n".join(lines)


def _run(script: Path) -> None:
    """Runs the file as `python FILE` would, but for the first word of the command line, which help shows."""
    spec = spec_from_file_location("__main__", script)
    spec.loader.exec_module(module_from_spec(spec))


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{COMMAND}: there is no command {word!r}; {hint}`{COMMAND} --help` lists them all"

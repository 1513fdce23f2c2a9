"""The command `dalle`: one word for each script, from any directory, also where only the wheel is installed.

    dalle train-dvae --steps 100                         as python scripts/train_dvae.py --steps 100
    torchrun --nproc-per-node 8 -m dalle encode-images   as torchrun --nproc-per-node 8 scripts/encode_images.py

The script itself is run, so both forms have the same words. `dalle --help` imports none of them.
"""

import difflib
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from dalle import __version__
from dalle.paths import COMMAND, SCRIPTS, program

GROUPS = {
    "everything at once": {
        "quickstart": "train a small DALL-E on drawn shapes and draw with it",
    },
    "data": {
        "check-data": "read all of your data once: what is in it, what is broken",
        "convert-captions": "make a table of a public set of captions",
        "write-tars": "pack images and captions into tars",
    },
    "training, in this order": {
        "train-tokenizer": "learn the text vocabulary",
        "train-dvae": "train the dVAE: stage one",
        "encode-images": "turn images into tokens with it",
        "train-transformer": "train the transformer on them: stage two",
        "train-clip": "train a CLIP, to rank images",
    },
    "drawing and measuring": {
        "sample": "draw images for a caption and keep the best",
        "app": "a web page that draws",
        "evaluate": "measure a model or its parts",
        "inspect-checkpoint": "say what a checkpoint is, without running what is in it",
        "plot": "draw the curves of runs",
        "report": "a run as one page of HTML",
        "push-model": "give a model to the Hugging Face Hub",
    },
    "planning": {
        "plan": "memory, time, traffic and cost of a training, before it",
        "sweep": "find a learning rate by short trainings",
    },
    "this machine and this library": {
        "benchmark": "measure speed and memory on this machine",
        "notebooks": "run the notebooks anew and keep their images",
    },
}
"""Each command and its line in --help, under a heading. The script of train-dvae is scripts/train_dvae.py."""
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}


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


def listing() -> str:
    """What `dalle --help` prints: each command with its line, under its heading."""
    width = max(map(len, COMMANDS))
    lines = [
        f"usage: {COMMAND} COMMAND [words] | {COMMAND} --version",
        "",
        "Train DALL-E, draw with it, measure it.",
    ]
    for heading, group in GROUPS.items():
        lines += ["", f"{heading}:", *(f"  {name:{width}}  {line}" for name, line in group.items())]
    lines += ["", f"{COMMAND} COMMAND --help explains every word of a command."]
    return "\n".join(lines)


def _run(script: Path) -> None:
    """Runs the file as `python FILE` would, but for the first word of the command line, which help shows."""
    spec = spec_from_file_location("__main__", script)
    spec.loader.exec_module(module_from_spec(spec))


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{COMMAND}: there is no command {word!r}; {hint}`{COMMAND} --help` lists them all"

"""The command `dalle`: one subcommand for each script, in any directory.

dalle train-dvae --steps 100                         the same as python scripts/train_dvae.py --steps 100
torchrun --nproc-per-node 8 -m dalle encode-images   the same as with scripts/encode_images.py
"""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from dalle import __version__
from dalle.config import cli_errors

GROUPS = {
    "everything at once": {
        "quickstart": "train a small DALL-E on shapes and generate images with it",
    },
    "data": {
        "check-data": "read a data set once and report statistics and bad samples",
        "convert-captions": "make a table of a public set of captions",
        "write-tars": "pack images and captions into WebDataset tars",
    },
    "training, in this order": {
        "train-tokenizer": "train the text tokenizer",
        "train-dvae": "train the dVAE: stage one",
        "encode-images": "encode images into tokens with it",
        "train-transformer": "train the transformer on them: stage two",
        "train-clip": "train a CLIP to rank images",
        "train-diffusion": "train a diffusion model, as GLIDE",
    },
    "sampling and evaluation": {
        "sample": "generate images for a prompt and keep the best",
        "app": "serve a web page that generates images",
        "evaluate": "measure a model",
        "inspect-checkpoint": "describe a checkpoint without running its code",
        "plot": "plot the curves of runs",
        "report": "show a run as one HTML page",
        "push-model": "upload a model to the Hugging Face Hub",
    },
    "planning": {
        "plan": "estimate memory, time, traffic and cost of a training run",
        "lr-sweep": "find a learning rate by short trainings",
        "benchmark": "measure speed and memory of this machine",
    },
}
"""Subcommands and their lines in --help, by heading; train-dvae is scripts/train_dvae.py."""
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}


def main(words: Sequence[str] | None = None) -> int:
    """Runs `dalle` with these arguments (default: the process's own); returns 0, or 2 for an unknown command.

    A command that ends the process (a user's mistake, a stopped training) raises SystemExit as its script
    does.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        with cli_errors():
            print(listing())
    elif words[0] == "--version":
        print(f"dalle {__version__}")
    elif (name := words[0].replace("_", "-")) in COMMANDS:
        sys.argv = [f"dalle {name}", *words[1:]]
        import_module(f"dalle.commands.{name.replace('-', '_')}").main()
    else:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        print(f"dalle: unknown command {words[0]!r}; {hint}`dalle --help` lists them all", file=sys.stderr)
        return 2
    return 0


def listing() -> str:
    """Text of `dalle --help`: each command with its line, under its heading."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: dalle COMMAND [arguments] | dalle --version",
        "",
        "Train DALL-E, sample from it, measure it.",
    ]
    for heading, group in GROUPS.items():
        lines += ["", f"{heading}:", *(f"  {name:{width}}  {line}" for name, line in group.items())]
    lines += ["", "dalle COMMAND --help explains every argument of a command."]
    return "\n".join(lines)

"""What is shipped beside the code: the configurations, and the scripts that `dalle COMMAND` runs.

In a checkout they lie beside the package; a wheel carries them inside it (setup.py). Whoever installed the wheel has
no scripts/ to type, so the commands that messages speak of are told in the form that was typed.
"""

import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
COMMAND = "dalle"


def _shipped(name: str) -> Path:
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


CONFIGS = _shipped("configs")
SCRIPTS = _shipped("scripts")


def find_config(path: Path | str) -> Path:
    """The file itself, or where there is none here the shipped one: configs/dvae/small.yaml works in any directory."""
    path = Path(path)
    if path.parts[:1] != ("configs",) or path.exists():
        return path
    shipped = CONFIGS.joinpath(*path.parts[1:])
    return shipped if shipped.is_file() and ".." not in path.parts else path


def program(command: str) -> str:
    """What `dalle COMMAND` is called in help and messages: the first word of its command line."""
    return f"{COMMAND} {command}"


def typed_before(words: list[str]) -> str:
    """What was typed before these words: the script, and what it chose by."""
    chosen = max(1, len(sys.argv) - len(words))
    return " ".join(sys.argv[: chosen if sys.argv[chosen:] == words else 1])


def as_typed(text: str) -> str:
    """A text whose commands (python scripts/train_dvae.py) read as this process was started (dalle train-dvae)."""
    if not sys.argv[0].startswith(program("")):
        return text
    text = re.sub(
        r"\b(torchrun [^\n]*?)scripts/(\w+)\.py", lambda m: f"{m[1]}-m {program(_dashed(m[2]))}", text
    )
    return re.sub(r"(?:python )?\bscripts/(\w+)\.py", lambda m: program(_dashed(m[1])), text)


def _dashed(name: str) -> str:
    return name.replace("_", "-")

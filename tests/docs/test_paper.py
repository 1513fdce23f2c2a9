"""Every name in docs/paper.md exists."""

import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = re.findall(r"`([^`]+)`", (ROOT / "docs" / "paper.md").read_text(encoding="utf-8"))
PATHS = sorted({name for name in NAMES if "/" in name})
DOTTED = sorted({name for name in NAMES if name.startswith("dalle.")})


def test_paths_and_names_exist():
    assert len(PATHS) > 10
    assert len(DOTTED) > 20
    assert [path for path in PATHS if not (ROOT / path).exists()] == []
    for name in DOTTED:
        resolve(name)


def resolve(name: str):
    """The module, class, function or method of a dotted name."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[split:]:
            found = getattr(found, attribute)
        return found
    raise AttributeError(name)

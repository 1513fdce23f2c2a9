"""Every name in docs/paper.md exists."""

import re
from pathlib import Path
from pkgutil import resolve_name

ROOT = Path(__file__).parents[2]
NAMES = re.findall(r"`([^`]+)`", (ROOT / "docs" / "paper.md").read_text(encoding="utf-8"))
PATHS = sorted({name for name in NAMES if "/" in name})
DOTTED = sorted({name for name in NAMES if name.startswith("dalle.")})


def test_paths_and_names_exist():
    assert len(PATHS) > 10
    assert len(DOTTED) > 20
    assert [path for path in PATHS if not (ROOT / path).exists()] == []
    for name in DOTTED:
        resolve_name(name)

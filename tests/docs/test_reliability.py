"""docs/reliability.md: its tests exist, its table has every suite."""

import re
from pathlib import Path

from tests.torture.test_hostile_inputs import SUITES
from tests.torture.test_interruptions import STAGES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_suite_has_its_figures_and_nothing_failed():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line[:2] == "| "
    ]
    suites = {row[1]: [int(cell.replace(",", "")) for cell in row[2:]] for row in rows if row[1] in SUITES}
    assert suites.keys() == SUITES.keys()
    for tried, *held, otherwise in suites.values():
        assert (tried, otherwise) == (sum(held), 0)
    stages = {row[1]: row[2:] for row in rows if row[1] in STAGES}
    assert stages.keys() == {*STAGES}


def test_every_file_that_it_names_exists():
    assert all((ROOT / path).exists() for path in re.findall(r"`(tests/[\w/.]+)`", TEXT))

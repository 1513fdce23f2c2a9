"""Options of `make torture`, and its table."""

from pathlib import Path

import pytest

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="of all suites together")
    parser.addoption("--seed", default="0", help="of the damages and the instants of kills")
    parser.addoption("--first", type=int, default=0, help="number of the first attempt of each suite, to repeat it")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--seed", "0")


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """Of one suite."""
    minutes = request.config.getoption("--minutes", None)
    return 60 * minutes / len(request.session.items) if minutes else 3


@pytest.fixture
def report(request: pytest.FixtureRequest):
    """report(name, counts): a row of the table."""
    return lambda name, counts: request.config.stash[ROWS].append((name, counts))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for name, counts in config.stash[ROWS]:
        text = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        terminalreporter.write_line(f"{name}: {text} (seed {config.getoption('--seed', '0')})")

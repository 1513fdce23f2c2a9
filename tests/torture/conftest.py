"""Options of `make torture`, and its table."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="of all suites together")
    parser.addoption("--seed", default="0", help="of the damages and the instants of kills")
    parser.addoption("--first", type=int, default=0, help="number of each suite's first attempt")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--seed", "0")


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """Of one suite."""
    minutes = request.config.getoption("--minutes", None)
    return 60 * minutes / len(request.session.items) if minutes else 3


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    for name, counts in [row for report in rows for row in report.user_properties]:
        text = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        terminalreporter.write_line(f"{name}: {text} (seed {config.getoption('--seed', '0')})")

"""Every reader over damaged and hostile inputs; `make torture` runs it at length."""

from pathlib import Path

import pytest

from tests.torture import data_suites, model_suites
from tests.torture.harness import FAILED, torture

SUITES = data_suites.SUITES | model_suites.SUITES


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_what_is_damaged_is_read_right_left_out_or_refused(name, chain, tmp_path, seed, seconds, report, request):
    first = request.config.getoption("--first", 0)
    result = torture(SUITES[name], tmp_path / "place", chain, f"{seed} {name}", seconds, first)
    report(name, {"tried": result.counts.total(), **dict(result.counts.most_common()), "MiB": result.mebibytes})
    failures = {text.strip().splitlines()[-1]: text for text in reversed(result.failures)}
    assert not result.counts[FAILED], "\n\n".join(list(failures.values())[:8])

"""Every reader over damaged and hostile inputs; `make torture` runs it at length."""

import pytest

from tests.torture import data_suites, model_suites
from tests.torture.harness import FAILED, torture

SUITES = data_suites.SUITES | model_suites.SUITES


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_what_is_damaged_is_read_right_left_out_or_refused(name, chain, tmp_path, seed, seconds, request):
    first = request.config.getoption("--first", 0)
    result = torture(SUITES[name], tmp_path / "place", chain, f"{seed} {name}", seconds, first)
    counts = {"tried": result.counts.total(), **result.counts, "MiB more": result.mebibytes}
    request.node.user_properties.append((name, dict(counts)))
    failures = {text.strip().splitlines()[-1]: text for text in reversed(result.failures)}
    assert not result.counts[FAILED], "\n\n".join(list(failures.values())[:8])

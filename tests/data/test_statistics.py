"""Statistics of a dataset: dalle/data/statistics.py."""

from collections import Counter

import numpy as np
import pytest

from dalle.data import open_source, statistics
from dalle.data.config import PAPER_FILTERS
from dalle.data.statistics import DatasetScanner, DatasetStats, find_duplicates, summarize
from tests.helpers.scenes import put, scene


@pytest.mark.parametrize("workers", [0, 2])
def test_duplicates_across_chunks_point_to_the_first(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(statistics, "CHUNK", 3)
    seeds = [0, 1, 2, 0, 3, 4, 1, 0, 5, 6, 1]
    for i, seed in enumerate(seeds):
        image = scene(seed, (200, 160)).resize((200 - 5 * i, 160 - 4 * i))
        put(tmp_path / "set", f"{i:02}.png", image, "an image")
    source, stats = open_source(tmp_path / "set"), DatasetStats()
    for part in DatasetScanner(source, PAPER_FILTERS).scan(workers):
        stats.add(part)
    expected = [(i, seeds.index(seed)) for i, seed in enumerate(seeds) if seeds.index(seed) != i]
    assert sorted(find_duplicates(source, stats, workers)) == expected
    (tmp_path / "set" / "06.png").unlink()
    assert sorted(find_duplicates(source, stats, workers)) == [pair for pair in expected if pair[0] != 6]


def test_a_summary_against_numpy():
    values = np.random.default_rng(0).geometric(0.1, 5000)
    numbers = summarize(Counter(values.tolist()))
    expected = np.percentile(values, [0, 5, 50, 95, 100], method="inverted_cdf").tolist()
    assert [numbers[name] for name in ("min", "p5", "median", "p95", "max")] == expected
    assert numbers["mean"] == pytest.approx(values.mean(), abs=0.005)
    assert summarize(Counter()) == {}

"""Bad samples, counted and logged: dalle/data/bad_samples.py."""

import json
from collections import Counter
from contextlib import nullcontext

import pytest

from dalle.data.bad_samples import BadSampleLog
from dalle.types import BadSample


def bad(*indices, cause="truncated"):
    return [BadSample(i, f"m{i}", cause) for i in indices]


def test_a_resumed_run_continues_its_file(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    opening = [BadSample(None, "x.png", "missing twin"), BadSample(None, "x.db", "unused file")]
    for _ in range(2):
        log = BadSampleLog(path, 1000, opening)
        log.add(bad(4), 5, 10)
    log.add(bad(5, cause="empty caption"), 6, 20)
    assert log.counts == Counter({"missing twin": 1, "truncated": 1, "empty caption": 1, "unused file": 1})
    text = "3 samples: 1 missing twin, 1 truncated, 1 empty caption; 1 unused files; each is named"
    assert text in str(log)
    with path.open("a") as file:
        file.write('{"index": 6, "na')  # an interrupted run
    again = BadSampleLog(path, 1000, opening)
    again.add([], 7, 30)
    assert again.counts == log.counts
    again.add(bad(7), 7, 30)
    names = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    assert names == ["x.png", "x.db", "m4", "m5", "m7"]


def test_a_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    BadSampleLog(path, 1000).add([], 0, 10)
    assert not path.exists()  # nothing to write
    BadSampleLog(path, 1000).add([BadSample(4, "of another set", "truncated")], 0, 10)
    BadSampleLog(path, 1000).add([], 0, 10)
    assert path.read_text() == ""


@pytest.mark.parametrize(
    ("size", "count", "seen", "replaced", "message"),
    [
        (10**6, 101, 10_000, False, r"101 of 10000 samples .*\(1\.0%, more than 1\.0%\): skipped 301"),
        (10**6, 101, 10_101, False, None),
        (10**6, 100, 100, False, None),
        (500, 101, 10**6, False, "101 of 500 samples"),  # many epochs of a small dataset
        (10**6, 101, 50, True, r"101 of 151 samples"),  # fifty requested, and as many read in place of others
        (10**6, 101, 9_999, True, None),
    ],
)
def test_a_run_ends_above_one_percent_and_a_hundred_samples(size, count, seen, replaced, message):
    log = BadSampleLog(None, size)
    log.add(bad(*range(200, 400), cause="filter:min_words"), 0, 400)  # filtered ones never end a run
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        log.add(bad(*range(count)), 0, seen, replaced)
    assert log.counts == {"filter:min_words": 200, "truncated": count}

"""Profiles of training steps: the steps that are profiled, the files, wrong values."""

import json
from dataclasses import replace

import pytest

from dalle.commands.train_dvae import TrainDVAEArgs, train_dvae
from dalle.train.config import profile_steps
from dalle.train.profiler import StepProfiler


def test_a_training_writes_a_trace_and_a_table(tiny_runs, tmp_path, capsys):
    train_dvae(replace(tiny_runs.dvae, out=tmp_path, steps=4, profile="2:3"))
    trace = json.loads((tmp_path / "profile-2-3.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2
    table = (tmp_path / "profile-2-3.txt").read_text()
    assert "aten::" in table
    assert table in capsys.readouterr().out


def test_a_resumed_run_profiles_what_is_left_and_one_that_ends_early_nothing(tmp_path):
    with StepProfiler((2, 3), tmp_path / "missing") as profiler:
        for step in (4, 5):
            profiler.start_step(step)
            assert profiler.profile is None
    with StepProfiler((2, 3), tmp_path) as profiler:
        profiler.start_step(3)
        profiler.end_step(3)
    with StepProfiler((7, 9), tmp_path) as profiler:
        profiler.start_step(7)
        profiler.end_step(7)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["profile-2-3.json", "profile-2-3.txt"]


@pytest.mark.parametrize("text", ["", "3", "0:2", "3:2", "a:b", "1:2:3", "-1:4", "1:99999999999999"])
def test_other_words_are_refused(text):
    with pytest.raises(ValueError, match="profile must be FIRST:LAST"):
        TrainDVAEArgs(profile=text)
    assert profile_steps("10:13") == (10, 13)

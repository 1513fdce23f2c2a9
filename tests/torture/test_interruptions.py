"""Kills and full disks at random instants of every stage; `make torture` runs it at length."""

import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalle.commands.encode_images import encode_images
from dalle.commands.sample import SampleArgs, sample
from dalle.commands.train_clip import train_clip
from dalle.commands.train_dvae import train_dvae
from dalle.commands.train_tokenizer import train_tokenizer
from dalle.commands.train_transformer import train_transformer
from dalle.config import cli_errors
from dalle.sampling import SamplingConfig
from dalle.text import load_text_tokenizer
from dalle.train import checkpoint
from tests.helpers.line import file_contents, log_lines, newest_files
from tests.helpers.processes import FORKSERVER

REFUSED = 3
"""Exit status of a run that ended with one line for the user."""
STAGES = ("text", "dvae", "tokens", "transformer", "clip", "samples")


@pytest.fixture
def stages(
    tiny_runs: SimpleNamespace, chain: Path, with_inputs: Callable, tmp_path: Path
) -> dict[str, tuple]:
    """The function and the arguments of each stage, but for `out`."""
    data, encode = replace(tiny_runs.dvae.data, workers=1), replace(tiny_runs.encode.encode, shard=4)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red circle, {i}" for i in range(8)))
    options = {"best_of": 2, "num_images": 1, "device": "cpu", "precision": "fp32"}
    options["sampling"] = SamplingConfig(batch_size=4)
    return {
        "text": (train_tokenizer, replace(tiny_runs.text, captions=2000)),
        "dvae": (train_dvae, replace(tiny_runs.dvae, steps=30, data=data)),
        "tokens": (encode_images, replace(tiny_runs.encode, dvae=chain / "dvae", encode=encode)),
        "transformer": (train_transformer, with_inputs(tiny_runs.transformer, chain, steps=20)),
        "clip": (train_clip, with_inputs(tiny_runs.clip, chain, steps=20)),
        "samples": (sample, SampleArgs(model=chain / "model", prompts_file=prompts, **options)),
    }


def work(function: Callable, args: Any, most_bytes: int | None, begun: Any) -> None:
    """A stage, as its command does it; one thread, since two round sums differently; slow writes."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    write = checkpoint.write_tensors

    def slow_write(*args, **kwargs):  # so that many a kill falls into a save
        time.sleep(0.01)
        write(*args, **kwargs)

    checkpoint.write_tensors = slow_write
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    begun.set()
    try:
        with cli_errors(parallel=True):
            function(args)
    except SystemExit as stop:
        os._exit(REFUSED if str(stop.code).startswith("error: ") else 4)
    os._exit(0)


def run(function: Callable, args: Any, seconds: float = 300, most_bytes: int | None = None) -> int:
    """The exit status after so many seconds at most; then the process is killed."""
    begun = FORKSERVER.Event()
    process = FORKSERVER.Process(target=work, args=(function, args, most_bytes, begun))
    process.start()
    begun.wait(60)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def contents(out: Path) -> Any:
    """All that must not depend on interruptions."""
    if (out / "checkpoints").is_dir():
        assert not list((out / "checkpoints").glob(".partial*"))
        return newest_files(out), log_lines(out), log_lines(out, evaluations=True)
    files = {name: data for name, data in file_contents(out).items() if not name.startswith(".")}
    if "text_tokenizer.json" in files:  # its merges are not reproducible
        files["text_tokenizer.json"] = load_text_tokenizer(out / "text_tokenizer.json").vocab_size
    return files


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_no_interruption_changes_a_bit(stage, stages, tmp_path, seed, seconds, record_property):
    """Three kills and a small disk, the last run to its end, again and again in new directories."""
    function, args = stages[stage]
    started = time.time()
    assert run(function, replace(args, out=tmp_path / "whole")) == 0
    rng, counts = Random(f"{seed} {stage}"), Counter()
    whole = contents(tmp_path / "whole")
    files = [path.stat() for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    duration = time.time() - min(file.st_mtime for file in files)
    while not counts or time.time() < started + seconds:
        interrupted = replace(args, out=tmp_path / f"run-{counts['resumed bit for bit']}")
        for most_bytes in (None, rng.randrange(max(file.st_size for file in files)), None, None):
            before = set(interrupted.out.rglob(".partial*"))
            seconds_left, changed = rng.uniform(0, duration), interrupted
            if most_bytes is not None:
                seconds_left = 300
                if hasattr(args, "data"):  # the limit would be one of the workers' shared memory too
                    changed = replace(interrupted, data=replace(args.data, workers=0))
            status = run(function, changed, seconds_left, most_bytes)
            if status == -signal.SIGKILL and most_bytes is None:
                counts["kills"] += 1
                counts["during a save"] += bool(set(interrupted.out.rglob(".partial*")) - before)
            else:
                assert status in (0, REFUSED if most_bytes is not None else 0), f"exit status {status}"
                counts["full disks"] += status == REFUSED
        assert run(function, interrupted) == 0
        assert contents(interrupted.out) == whole, f"{interrupted.out} is not {tmp_path / 'whole'}"
        counts["resumed bit for bit"] += 1
    record_property(f"interruptions of {stage}", dict(counts))

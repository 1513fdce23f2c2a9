"""Run lifecycle: asynchronous checkpoints, signals, the directory lock, full disks and kills."""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from dalle.commands.train_dvae import train_dvae
from dalle.config import cli_errors
from dalle.train import checkpoint, checkpoint_saver, trainer
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.checkpoint_saver import Preempted, lock_directory
from tests.helpers.line import (
    at_step,
    checkpoint_names,
    file_contents,
    fit_line,
    log_lines,
    newest_files,
    power_cut,
    send,
)
from tests.helpers.processes import FORKSERVER, run_processes

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def slow_write(monkeypatch):
    """Writes wait until `allow` is set; `most` has the number of simultaneous ones."""
    allow, one, most = threading.Event(), threading.Lock(), []
    write = checkpoint_saver.write_checkpoint

    def waiting(*args):
        most.append(1 + one.locked())
        with one:
            assert allow.wait(60)
            return write(*args)

    monkeypatch.setattr(checkpoint_saver, "write_checkpoint", waiting)
    return allow, most


def test_training_goes_on_while_a_checkpoint_is_written(slow_write, tmp_path):
    """The write of step 2 waits for step 3: it would never end if step 3 waited for it."""
    allow, _ = slow_write
    fit_line(tmp_path / "run", steps=3, save_every=2, objective=at_step(3, allow.set))
    assert checkpoint_names(tmp_path / "run") == ["latest", "step-00000002", "step-00000003"]
    fit_line(tmp_path / "other", steps=2)
    step_2 = tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors"
    assert step_2.read_bytes() == (latest_checkpoint(tmp_path / "other") / "model.safetensors").read_bytes()


def test_one_checkpoint_is_written_at_a_time_and_all_before_the_end(slow_write, tmp_path):
    allow, most = slow_write
    threading.Timer(0.2, allow.set).start()
    fit_line(tmp_path, steps=5, keep_last=9)
    assert most == [1] * 5
    assert checkpoint_names(tmp_path) == ["latest", *(f"step-0000000{step}" for step in range(1, 6))]


def test_an_error_is_raised_after_the_checkpoint_is_written(slow_write, tmp_path):
    allow, _ = slow_write
    threading.Timer(0.2, allow.set).start()
    with pytest.raises(RuntimeError, match="power cut"):
        fit_line(tmp_path, steps=3, objective=at_step(2, power_cut))
    assert checkpoint_names(tmp_path) == ["latest", "step-00000001"]


full_disk = Mock(side_effect=OSError(28, os.strerror(28)))


@pytest.mark.parametrize(("first", "words"), [(0, "there is no earlier one"), (2, "step-00000002 is intact")])
def test_a_failed_write_ends_the_run_and_says_what_is_left(first, words, tmp_path, monkeypatch):
    if first:
        fit_line(tmp_path, steps=first)
    steps = []
    monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
    with pytest.raises(OSError, match=rf"step {first + 1} \(No space left on device\); .*{words}"):
        fit_line(tmp_path, steps=1000, objective=at_step(1000, lambda: steps.append(1)))
    assert not steps
    names = [f"step-0000000{step}" for step in range(1, first + 1)]
    assert checkpoint_names(tmp_path) == (["latest", *names] if first else [])


def test_of_two_failures_the_first_is_raised_and_the_other_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
    with pytest.raises(RuntimeError, match="power cut"):
        fit_line(tmp_path, steps=3, objective=at_step(2, power_cut))
    assert "warning: cannot write the checkpoint of step 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_saves_at_the_end_of_the_step_and_exits_75(name, tmp_path, capsys):
    fit_line(tmp_path / "whole", steps=5)
    if name == "SIGHUP":  # ignored where the tests run under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Preempted) as stopped, cli_errors():
        fit_line(tmp_path / "run", steps=5, save_every=100, objective=at_step(3, lambda: send(name)))
    assert stopped.value.code == 75
    printed = capsys.readouterr().out
    assert f"stopped by {name} after step 3 of 5" in printed
    assert "the same command resumes it (exit status 75)" in printed
    assert checkpoint_names(tmp_path / "run") == ["latest", "step-00000003"]
    assert signal.getsignal(getattr(signal, name)) == before
    fit_line(tmp_path / "run", steps=5, save_every=100)
    assert newest_files(tmp_path / "run") == newest_files(tmp_path / "whole")


def test_signals_again_and_again_change_nothing(tmp_path):
    """SLURM and torchrun each pass the same one on; SIGTERM follows SIGUSR1. In the last step none stops."""
    signals = ("SIGUSR1", "SIGTERM", "SIGTERM", "SIGINT")
    with pytest.raises(Preempted):
        fit_line(tmp_path, steps=5, objective=at_step(2, lambda: [send(name) for name in signals]))
    assert latest_checkpoint(tmp_path).name == "step-00000002"
    assert fit_line(tmp_path, steps=5, objective=at_step(5, lambda: send("SIGTERM"))).step == 5


def test_a_second_interrupt_stops_at_once(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(checkpoint_saver, "SAME_PRESS", 0.1)

    def twice():
        send("SIGINT")
        time.sleep(0.2)
        send("SIGINT")

    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path, steps=5, objective=at_step(2, twice))
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_of_the_main_thread_a_run_works_without_signals(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(fit_line, tmp_path, steps=2).result().step == 2
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("name", ["train_dvae", "train_transformer", "train_clip", "quickstart"])
def test_every_training_script_exits_75_when_it_is_stopped(
    name, script, chain, tiny_configs, tmp_path, monkeypatch
):
    """SIGTERM in the first step; nothing after the stopped stage is begun."""
    train_step = trainer.train_step

    def stopping(*args):
        send("SIGTERM")
        return train_step(*args)

    monkeypatch.setattr(trainer, "train_step", stopping)
    quickstart, run = name == "quickstart", tmp_path / "run"
    family = tiny_configs / name.removeprefix("train_") / "shapes.yaml"
    words = ["--configs", tiny_configs, "--device", "cpu"] if quickstart else ["--config", family]
    words += ["--tokens", chain / "tokens"] if name == "train_transformer" else []
    words += ["--text-tokenizer", chain / "text"] if name in ("train_transformer", "train_clip") else []
    done = script(name, "--out", run, *words)
    assert done.code == 75
    assert "stopped by SIGTERM after step 1 of 2" in done.out
    assert latest_checkpoint(run / "dvae" if quickstart else run).name == "step-00000001"
    if quickstart:
        assert sorted(path.name for path in run.iterdir()) == ["dvae", "text"]


def hold(run: Path, pipe, with_child: bool) -> None:
    lock = lock_directory(run)
    child = FORK.Process(target=time.sleep, args=(600,))
    if with_child:
        child.start()
    pipe.send(child.pid)
    time.sleep(600)
    lock.close()


@pytest.mark.parametrize("with_child", [False, True])
def test_a_directory_is_one_runs_until_its_process_is_gone(with_child, tmp_path):
    """Also if it is killed, and what it forked lives on."""
    receiver, sender = FORK.Pipe(duplex=False)
    holder = FORK.Process(target=hold, args=(tmp_path, sender, with_child))
    holder.start()
    child = receiver.recv()
    try:
        with pytest.raises(ValueError, match=rf"in use by process {holder.pid} on .*another --out"):
            fit_line(tmp_path, steps=1)
        assert not (tmp_path / "checkpoints").exists()
        holder.kill()
        holder.join()
        assert fit_line(tmp_path, steps=1).step == 1
    finally:
        holder.kill()
        if child:
            os.kill(child, signal.SIGKILL)


def train_on(rank: int, run: Path) -> int:
    return fit_line(run, steps=3).step


def test_a_directory_is_free_after_a_run_and_after_one_that_broke(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        fit_line(tmp_path, steps=2, objective=at_step(2, power_cut))
    assert run_processes(1, train_on, tmp_path) == [3]


def train_on_a_small_disk(rank: int, run: Path, limit: int) -> str:
    """As a command does it; no file may grow beyond the limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises(SystemExit) as end, cli_errors():
        fit_line(run, steps=4, width=100)
    return end.value.code


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tmp_path):
    fit_line(tmp_path, steps=3, width=100)
    before = file_contents(tmp_path / "checkpoints")
    (error,) = run_processes(1, train_on_a_small_disk, tmp_path, 20_000)
    for words in ("error: ", "checkpoint of step 4 (File too large)", "step-00000003 is intact"):
        assert words in error
    assert file_contents(tmp_path / "checkpoints") == before
    assert fit_line(tmp_path, steps=4, width=100).step == 4


def train_slowly(run) -> None:
    """Slow writes, so that many a kill falls into a save; one thread, since two round sums differently."""
    torch.set_num_threads(1)
    write = checkpoint.write_tensors

    def slow_write(*args, **kwargs):
        time.sleep(0.01)
        write(*args, **kwargs)

    checkpoint.write_tensors = slow_write
    train_dvae(run)
    os._exit(0)


def open_saves(run: Path) -> set[tuple[Path, int]]:
    """What saves have begun to write and not completed, and since when."""
    found = set()
    for path in (run / "checkpoints").glob(".partial-step-*"):
        with contextlib.suppress(FileNotFoundError):  # renamed by now
            found.add((path, path.stat().st_ctime_ns))
    return found


def kill_somewhere(run, rng: random.Random) -> bool:
    """Trains, waits for some saves and a moment, and kills it; whether a save was open."""
    left, seen, count = open_saves(run.out), set(), rng.randint(1, 4)
    process = FORKSERVER.Process(target=train_slowly, args=(run,))
    process.start()
    while process.is_alive() and len(seen) < count:
        seen |= {path for path, _ in open_saves(run.out) - left}
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.06))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"ended by itself with {process.exitcode}"
    return bool(open_saves(run.out) - left)


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tiny_runs, tmp_path):
    """The dVAE's training with a data worker: SIGKILL at 20 instants, among them during saves."""
    base = replace(tiny_runs.dvae, steps=160, data=replace(tiny_runs.dvae.data, workers=1))
    whole, run = replace(base, out=tmp_path / "whole"), replace(base, out=tmp_path / "run")
    train_dvae(whole)
    rng = random.Random(0)
    assert sum(kill_somewhere(run, rng) for _ in range(20)) >= 3
    train_dvae(run)
    assert newest_files(run.out) == newest_files(whole.out)
    for evaluations in (False, True):
        assert log_lines(run.out, evaluations) == log_lines(whole.out, evaluations)
    assert not list((run.out / "checkpoints").glob(".partial*"))

"""A run that dies at any instant goes on as if it had not (dalle/train: checkpoint, keeper, signals,
lock)."""

import contextlib
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dalle.commands.train_dvae import train_dvae
from dalle.config import cli_errors, resume_fingerprint
from dalle.io.files import CHECKSUMS
from dalle.schedules import Schedule
from dalle.train import TrainConfig, Trainer, checkpoint
from dalle.train import checkpoint_saver as keeper
from dalle.train import trainer as loop
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.checkpoint_saver import SAME_PRESS, Preempted, RunLock
from dalle.train.config import EMAConfig, OptimizerConfig
from dalle.train.loggers import read_log
from dalle.types import Loss

FORK = multiprocessing.get_context("fork")
CLEAN = multiprocessing.get_context(
    "forkserver"
)  # what forks after a backward pass may not have one of its own
CLEAN.set_forkserver_preload(["dalle.commands.train_dvae"])
PROJECT = Path(__file__).parents[2]
CONFIG = TrainConfig(
    batch_size=4,
    optimizer=OptimizerConfig(lr=Schedule(0.1, 0.1), warmup_steps=0),
    ema=EMAConfig(decay=0.9, update_every=1),
    precision="fp32",
    log_every=1,
    save_every=1,
    keep_last=2,
)


def squared_error(model: nn.Module, batch: Tensor, step: int) -> Loss:
    return Loss((model(batch) - 2 * batch - 0.1 * torch.randn_like(batch)).square().mean())


def fit_line(out: Path, steps: int, objective=squared_error, resume="auto", run=None, width=1, **changes):
    """A line, y = w x + b, which trains in milliseconds."""
    torch.manual_seed(0)
    meta = {"kind": "line", "config": run or {}, "inputs": {}}
    return Trainer(
        nn.Linear(width, width),
        objective,
        lambda step: torch.linspace(-1, 1, 4 * width).view(4, width) + step,
        replace(CONFIG, **changes),
        steps=steps,
        seed=0,
        run_dir=out,
        meta=meta,
        resume=resume,
    ).train()


def at_step(step: int, act: Callable[[], None]):
    """The line's objective, which acts in the middle of a step."""

    def objective(model, batch, now):
        if now + 1 == step:
            act()
        return squared_error(model, batch, now)

    return objective


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "meta.json")


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(file, harm, tmp_path, capsys):
    fit_line(tmp_path / "whole", steps=4)
    fit_line(tmp_path / "run", steps=3)
    harm(latest_checkpoint(tmp_path / "run") / file)
    fit_line(tmp_path / "run", steps=4)
    said = capsys.readouterr().out
    assert f"step-00000003/{file}" in said
    assert "warning: " in said
    assert "taking step-00000002, the newest that is whole" in said
    assert "resuming from step 2" in said
    assert files(latest_checkpoint(tmp_path / "run")) == files(latest_checkpoint(tmp_path / "whole"))


def test_without_a_whole_checkpoint_a_run_is_refused_and_each_damage_named(tmp_path):
    fit_line(tmp_path, steps=2)
    for step, file in ((1, "ema.safetensors"), (2, "model.safetensors")):
        flip(tmp_path / "checkpoints" / f"step-0000000{step}" / file)
    with pytest.raises(
        ValueError, match=r"no checkpoint of .* is whole: .*2/model.*1/ema.*give another --out"
    ):
        fit_line(tmp_path, steps=3)


def test_a_pointer_that_is_lost_or_names_nothing_costs_no_checkpoint(tmp_path, capsys):
    fit_line(tmp_path, steps=3)
    (tmp_path / "checkpoints" / "latest").unlink()
    fit_line(tmp_path, steps=4)
    assert "resuming from step 3" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    fit_line(tmp_path, steps=5)
    assert "resuming from step 3" in capsys.readouterr().out


def test_sums_are_what_sha256sum_reads(tmp_path):
    fit_line(tmp_path, steps=1)
    folder = latest_checkpoint(tmp_path)
    names = [line.split("  ")[1] for line in (folder / CHECKSUMS).read_text().splitlines()]
    assert names == sorted(FILES)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", CHECKSUMS], cwd=folder, check=True)


def test_a_checkpoint_that_lacks_its_sums_is_not_whole(tmp_path):
    fit_line(tmp_path, steps=1)
    (latest_checkpoint(tmp_path) / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match="SHA256SUMS is missing or not a list of hashes"):
        fit_line(tmp_path, steps=2)


# ---------------------------------------------------------------------------------------------
# What is kept, and what going on says
# ---------------------------------------------------------------------------------------------


def test_every_mth_is_kept_besides_the_newest(tmp_path):
    fit_line(tmp_path, steps=9, keep_last=2, keep_every=3)
    assert folders(tmp_path) == ["latest", *(f"step-0000000{step}" for step in (3, 6, 8, 9))]


@pytest.mark.parametrize("every", [0, 3])
def test_keep_every_must_meet_a_save(every):
    with pytest.raises(ValueError, match="keep_every must be a multiple of save_every, 2, or null"):
        TrainConfig(save_every=2, keep_every=every)


def test_going_on_says_step_place_and_date(tmp_path, capsys):
    fit_line(tmp_path, steps=2)
    assert "going on" not in capsys.readouterr().out
    os.utime(latest_checkpoint(tmp_path) / "meta.json", (0, time.mktime((2021, 2, 24, 12, 30, 5, 0, 0, -1))))
    fit_line(tmp_path, steps=3)
    place = tmp_path / "checkpoints" / "step-00000002"
    said = f"line: resuming from step 2 of 3 ({place}, saved 2021-02-24 12:30:05)"
    assert capsys.readouterr().out.splitlines()[0] == said


def test_a_changed_configuration_goes_on_only_if_allowed_and_is_noted(tmp_path, capsys):
    fit_line(tmp_path, steps=2, run={"seed": 1, "train": {"batch_size": 4}})
    with pytest.raises(ValueError, match=r"\(train\.batch_size was 4, is 8\).*--resume changed to resume"):
        fit_line(tmp_path, steps=3, run={"seed": 1, "train": {"batch_size": 8}})
    fit_line(tmp_path, steps=3, run={"seed": 1, "train": {"batch_size": 8}}, resume="changed")
    assert "with another configuration: train.batch_size was 4, is 8" in capsys.readouterr().out
    noted = [line for line in read_log(tmp_path / "log.jsonl") if "changes" in line]
    assert noted == [{"step": 2, "changes": ["train.batch_size was 4, is 8"]}]
    fit_line(tmp_path, steps=4, run={"seed": 1, "train": {"batch_size": 8}})  # it is the run's own now


def test_how_often_is_saved_may_change():
    """The fingerprint of a run leaves out what changes no weight."""
    other = replace(CONFIG, log_every=5, save_every=4, keep_last=3, keep_every=8)
    assert resume_fingerprint(other) == resume_fingerprint(CONFIG)
    assert resume_fingerprint(replace(CONFIG, batch_size=8)) != resume_fingerprint(CONFIG)


def test_a_part_that_is_new_to_a_run_starts_afresh(tmp_path, monkeypatch):
    """As when another version, or --resume changed, gives training a memory that the checkpoint lacks."""

    class Part:
        def __init__(self):
            self.count = torch.zeros(1)

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, tensors):
            self.count.copy_(tensors["count"])

        def numbers(self):
            return {"name": "part"}

        def load_numbers(self, numbers):
            assert numbers == {"name": "part"}

    fit_line(tmp_path, steps=1)
    state_class, parts = loop.TrainState, []

    def with_part(*args):
        parts.append(Part())
        return state_class(*args, extras={"part": parts[-1]})

    monkeypatch.setattr(loop, "TrainState", with_part)
    fit_line(tmp_path, steps=2, objective=at_step(2, lambda: parts[-1].count.fill_(7)))
    assert (latest_checkpoint(tmp_path) / "part.safetensors").exists()
    fit_line(tmp_path, steps=3)
    assert [float(part.count) for part in parts] == [7, 7]


# ---------------------------------------------------------------------------------------------
# In the background
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def slow_write(monkeypatch):
    """Writing waits until `allow` is set; `at_work` counts the writings at once."""
    allow, at_work, most = threading.Event(), [], []
    write = keeper.write_checkpoint

    def waiting(*args):
        at_work.append(1)
        most.append(len(at_work))
        assert allow.wait(60)
        folder = write(*args)
        at_work.pop()
        return folder

    monkeypatch.setattr(keeper, "write_checkpoint", waiting)
    return allow, most


def test_training_goes_on_while_a_checkpoint_is_written(slow_write, tmp_path):
    """The write of step 2 waits for step 3: it would never end if step 3 waited for it."""
    allow, _ = slow_write
    fit_line(tmp_path / "run", steps=3, save_every=2, objective=at_step(3, allow.set))
    assert folders(tmp_path / "run") == ["latest", "step-00000002", "step-00000003"]
    fit_line(tmp_path / "other", steps=2)
    step_2 = tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors"
    assert step_2.read_bytes() == (latest_checkpoint(tmp_path / "other") / "model.safetensors").read_bytes()


def test_one_checkpoint_is_written_at_a_time_and_all_before_the_end(slow_write, tmp_path):
    allow, most = slow_write
    threading.Timer(0.2, allow.set).start()
    fit_line(tmp_path, steps=5, keep_last=9)
    assert most == [1] * 5
    assert folders(tmp_path) == ["latest", *(f"step-0000000{step}" for step in range(1, 6))]


def test_what_a_run_breaks_on_is_told_after_its_checkpoint_is_whole(slow_write, tmp_path):
    allow, _ = slow_write

    def breaks():
        threading.Timer(0.2, allow.set).start()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit_line(tmp_path, steps=3, objective=at_step(2, breaks))
    assert folders(tmp_path) == ["latest", "step-00000001"]


def full_disk(*args, **kwargs):
    raise OSError(28, os.strerror(28))


def test_a_failed_write_ends_the_run_and_says_what_is_left(tmp_path, monkeypatch):
    fit_line(tmp_path, steps=2)
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full_disk)
        with pytest.raises(
            OSError, match=r"cannot write the checkpoint of step 3 \(No space left on device\).*2 is intact"
        ):
            fit_line(tmp_path, steps=1000, objective=at_step(1000, lambda: steps.append(1)))
    assert not steps
    assert folders(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_a_first_write_that_fails_says_that_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
    with pytest.raises(OSError, match=r"there is no earlier one\. Free disk space"):
        fit_line(tmp_path, steps=1)


def test_two_failures_tell_the_first_and_mention_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "write_tensors", full_disk)

    def breaks():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit_line(tmp_path, steps=3, save_every=1, objective=at_step(2, breaks))
    assert "warning: cannot write the checkpoint of step 1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Asked to stop
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_at_the_end_of_the_step_and_exits_75(name, tmp_path, capsys):
    fit_line(tmp_path / "whole", steps=5)
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Preempted) as stopped, cli_errors():
        fit_line(tmp_path / "run", steps=5, save_every=100, objective=at_step(3, lambda: send(name)))
    assert stopped.value.code == 75
    said = capsys.readouterr().out
    assert f"line: stopped by {name} after step 3 of 5, saved in {tmp_path / 'run' / 'checkpoints'}" in said
    assert "the same command resumes it (exit status 75)" in said
    assert folders(tmp_path / "run") == ["latest", "step-00000003"]
    assert signal.getsignal(getattr(signal, name)) == before
    fit_line(tmp_path / "run", steps=5, save_every=100)
    assert files(latest_checkpoint(tmp_path / "run")) == files(latest_checkpoint(tmp_path / "whole"))


def test_a_signal_in_the_last_step_comes_too_late_to_stop_it(tmp_path):
    assert fit_line(tmp_path, steps=3, objective=at_step(3, lambda: send("SIGTERM"))).step == 3


def test_signals_again_and_again_change_nothing(tmp_path):
    """SLURM and torchrun each pass the same one on; SIGTERM follows SIGUSR1."""

    def many():
        for name in ("SIGUSR1", "SIGTERM", "SIGTERM", "SIGINT"):
            send(name)

    with pytest.raises(Preempted):
        fit_line(tmp_path, steps=5, objective=at_step(2, many))
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def test_a_second_interrupt_stops_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def twice():
        send("SIGINT")
        time.sleep(SAME_PRESS + 0.1)
        send("SIGINT")

    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path, steps=5, objective=at_step(2, twice))
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_of_the_main_thread_a_run_hears_nothing_and_works(tmp_path):
    steps, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: steps.append(fit_line(tmp_path, steps=2).step))
    thread.start()
    thread.join()
    assert steps == [2]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("script", ["train_dvae", "train_transformer", "train_clip", "quickstart"])
def test_every_training_script_exits_75_when_it_is_stopped(
    script, chain, tiny_configs, tmp_path, monkeypatch, capsys
):
    """SIGTERM in the first step; nothing after the stopped stage is begun."""
    train_step = loop.train_step

    def stopping(*args):
        send("SIGTERM")
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", stopping)
    monkeypatch.chdir(tmp_path)
    words = ["--out", tmp_path / "run"]
    if script == "quickstart":
        words += ["--configs", tiny_configs, "--device", "cpu"]
    else:
        words += ["--config", tiny_configs / script.removeprefix("train_") / "shapes.yaml"]
        words += ["--tokens", chain / "tokens"] if script == "train_transformer" else []
        words += ["--text-tokenizer", chain / "text"] if script in ("train_transformer", "train_clip") else []
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(PROJECT / "scripts" / f"{script}.py"), run_name="__main__")
    assert stopped.value.code == 75
    assert "stopped by SIGTERM after step 1 of 2" in capsys.readouterr().out
    run = tmp_path / "run" / "dvae" if script == "quickstart" else tmp_path / "run"
    assert latest_checkpoint(run).name == "step-00000001"
    if script == "quickstart":
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["dvae", "text"]


# ---------------------------------------------------------------------------------------------
# Two runs in one directory
# ---------------------------------------------------------------------------------------------


def hold(run: Path, pipe, with_child: bool) -> None:
    lock = RunLock(run)
    lock.take()
    child = FORK.Process(target=time.sleep, args=(600,))
    if with_child:
        child.start()
    pipe.send(child.pid if with_child else None)
    time.sleep(600)


@pytest.mark.parametrize("with_child", [False, True])
def test_a_directory_is_one_runs_until_its_process_is_gone(with_child, tmp_path):
    """Also if it is killed, and what it forked lives on."""
    receiver, sender = FORK.Pipe(duplex=False)
    holder = FORK.Process(target=hold, args=(tmp_path, sender, with_child))
    holder.start()
    child = receiver.recv()
    try:
        with pytest.raises(
            ValueError, match=rf"is in use by process {holder.pid} on .*wait until it ends, or give"
        ):
            fit_line(tmp_path, steps=1)
        assert not (tmp_path / "checkpoints").exists()
        holder.kill()
        holder.join()
        assert fit_line(tmp_path, steps=1).step == 1
    finally:
        holder.kill()
        if child:
            os.kill(child, signal.SIGKILL)


def test_a_directory_is_free_after_a_run_and_after_one_that_broke(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fit_line(tmp_path, steps=2, objective=at_step(2, lambda: 1 / 0))
    process = CLEAN.Process(target=fit_line, args=(tmp_path, 3))
    process.start()
    process.join()
    assert process.exitcode == 0


# ---------------------------------------------------------------------------------------------
# A disk that is really full, a process that is really killed
# ---------------------------------------------------------------------------------------------


def in_a_small_disk(run: Path, limit: int, said: Path) -> None:
    """As a script does it; no file may grow beyond the limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with cli_errors():
            fit_line(run, steps=4, width=100)
    except SystemExit as end:
        said.write_text(str(end.code))
        os._exit(1 if isinstance(end.code, str) else int(end.code))
    os._exit(0)


def test_a_disk_that_takes_no_more_keeps_the_last_checkpoint_and_says_so(tmp_path):
    fit_line(tmp_path / "run", steps=3, width=100)
    before = files(tmp_path / "run" / "checkpoints")
    process = CLEAN.Process(target=in_a_small_disk, args=(tmp_path / "run", 20_000, tmp_path / "said"))
    process.start()
    process.join()
    assert process.exitcode == 1
    said = (tmp_path / "said").read_text()
    assert "error: " in said
    assert "cannot write the checkpoint of step 4 (File too large)" in said
    assert "step-00000003 is intact" in said
    assert files(tmp_path / "run" / "checkpoints") == before
    assert fit_line(tmp_path / "run", steps=4, width=100).step == 4


def slow_writes() -> None:
    """So that many a kill falls into a save."""
    write = checkpoint.write_tensors

    def slowly(*args, **kwargs):
        time.sleep(0.01)
        write(*args, **kwargs)

    checkpoint.write_tensors = slowly


def train_slowly(run) -> None:
    torch.set_num_threads(
        1
    )  # as `_one_thread` in the tests' own process: sums of two threads differ in the last bits
    slow_writes()
    train_dvae(run)
    os._exit(0)


def lines(run: Path) -> int:
    return len(read_log(run / "log.jsonl")) if (run / "log.jsonl").exists() else 0


def begun(run: Path, pattern: str) -> set[tuple[Path, int]]:
    """What a save has begun to write, and when."""
    found = set()
    for path in (run / "checkpoints").glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # renamed by now
            found.add((path, path.stat().st_ctime_ns))
    return found


def kill_somewhere(run, rng: random.Random) -> str:
    """Trains, waits for some events, then a moment, and kills it; what was seen, and whether a save was
    open."""
    event, count = rng.choice(["step", "save", "file"]), rng.randint(1, 3)
    pattern = ".partial-step-*/model.safetensors" if event == "file" else ".partial-step-*"
    wanted, left, left_open = (
        lines(run.out) + 2 * count,
        begun(run.out, pattern),
        begun(run.out, ".partial-step-*"),
    )
    process = CLEAN.Process(target=train_slowly, args=(run,))
    process.start()
    seen: set[Path] = set()
    while process.is_alive():
        seen |= {path for path, when in begun(run.out, pattern) - left}
        if lines(run.out) >= wanted if event == "step" else len(seen) >= count:
            break
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.06))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"ended by itself with {process.exitcode}"
    newest = latest_checkpoint(run.out)
    step = int(newest.name.removeprefix("step-")) if newest else 0
    return f"{event} {count}, whole {step}" + ", in a save" * bool(
        begun(run.out, ".partial-step-*") - left_open
    )


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tiny_runs, tmp_path):
    """The dVAE's stage with a data worker: SIGKILL at 20 instants, among them during saves."""
    base = replace(tiny_runs.dvae, steps=160, data=replace(tiny_runs.dvae.data, workers=1))
    whole, run = replace(base, out=tmp_path / "whole"), replace(base, out=tmp_path / "run")
    train_dvae(whole)
    rng, seen = random.Random(0), []
    while len(seen) < 20:
        seen.append(kill_somewhere(run, rng))
    print(f"killed at: {seen}")
    assert sum("in a save" in what for what in seen) >= 3
    train_dvae(run)
    assert files(latest_checkpoint(run.out)) == files(latest_checkpoint(whole.out))
    clocks = {"step_time", "data_time_frac", "samples_per_sec"}
    logs = [
        [
            {k: v for k, v in line.items() if k not in clocks and "memory" not in k}
            for line in read_log(r.out / "log.jsonl")
        ]
        for r in (whole, run)
    ]
    assert logs[0] == logs[1]
    assert not list((run.out / "checkpoints").glob(".partial*"))

"""Dataloader: exact resume, workers that die, hang or raise, bad samples: dalle/data/dataloader.py."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from dalle.commands.train_dvae import train_dvae
from dalle.data import BatchReader, ImageTextLoader, Loader, sample_captions
from dalle.data.dataset import ImageTextDataset
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.loggers import read_log
from dalle.types import RawSample
from tests.helpers.failing import Failing
from tests.helpers.scenes import BAD, encoded, scene, write_scenes, write_scenes_tar


class Memory:
    """A source in memory; the samples in `bad` cannot be decoded."""

    skipped = ()

    def __init__(self, size: int, bad=()):
        self.size, self.bad, self.hash = size, set(bad), f"memory-{size}"

    def __len__(self):
        return self.size

    def name(self, index):
        return f"m{index}"

    def captions(self, index):
        return [f"{index} {word}" for word in ("one", "two", "three")]

    def read(self, index):
        bad = b"DDS \x7c" + bytes(75) + b"\x04\0\0\0what" + bytes(40)  # a NotImplementedError of Pillow
        data = bad if index in self.bad else encoded(scene(index, (24, 20)))
        return RawSample(self.name(index), data, self.captions(index))


@dataclass(frozen=True)
class Sums:
    """A batch that is quick to compare: samples, and the sum of each image."""

    def __call__(self, batch, step):
        sums = torch.from_numpy(batch.pixels).sum((1, 2, 3)).tolist()
        return step, list(batch.samples), sums, sample_captions(batch, 5)


def reader(size=10, bad=(), batch_size=3, **changes):
    return BatchReader(ImageTextDataset(Memory(size, bad), 16), batch_size, 7, "dvae", Sums(), **changes)


def stream(workers, first=0, steps=6):
    with ImageTextLoader(reader(), steps, workers) as batches:
        return [batches(step) for step in range(first, steps)]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_and_any_resume_gives_the_same_batches(workers):
    alone = stream(0)
    state = torch.get_rng_state()
    assert [step for step, *_ in alone] == list(range(6))
    assert stream(workers) == alone
    assert stream(workers, first=4) == alone[4:]  # in the second epoch
    assert stream(workers, steps=2) == alone[:2]
    assert torch.equal(torch.get_rng_state(), state)  # the generator of the training is not used
    with ImageTextLoader(reader(), 6, workers) as batches:
        assert [batches(step) for step in (3, 4, 0, 0, 5)] == [alone[step] for step in (3, 4, 0, 0, 5)]


@pytest.mark.slow
def test_spawned_workers_give_the_same_batches():
    alone, method = stream(0, steps=2), torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        assert stream(1, steps=2) == alone
    finally:
        torch.multiprocessing.set_start_method(method, force=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_value_error_of_a_worker_keeps_its_message(workers):
    with Loader(Failing("raises"), 3, workers) as batches:
        assert batches(0) == 0
        with pytest.raises(ValueError, match=r"^row 7 of the table is upside down$"):
            batches(1)


@pytest.mark.parametrize("pin", [False, True])
def test_batches_of_workers_are_pinned_when_asked(pin, monkeypatch):
    """By the arguments of torch's DataLoader: on a machine without CUDA it pins nothing."""
    given = []

    def data_loader(steps, pin_memory, **_):
        given.append(pin_memory)
        return iter(steps)

    monkeypatch.setattr("dalle.data.dataloader.DataLoader", data_loader)
    assert Loader(int, 3, workers=1, pin=pin)(0) == 0
    assert given == [pin]


def test_a_worker_that_dies_is_named():
    with (
        Loader(Failing("dies"), 3, workers=1, prefetch=1) as batches,
        pytest.raises(RuntimeError, match=r"no data for step \d: .*pid.*--data\.workers"),
    ):
        list(map(batches, range(3)))


def test_a_worker_that_hangs_is_named_and_ended(monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # torch waits so long
    before = set(torch.multiprocessing.active_children())
    with Loader(Failing("hangs"), 3, workers=2, prefetch=1, timeout=1) as batches:
        assert batches(0) == 0
        with pytest.raises(RuntimeError, match=r"no data for step 2: worker 1 \(pid \d+\) hangs"):
            batches(1)
    assert not set(torch.multiprocessing.active_children()) - before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_workers_ignore_signals_and_end_with_the_loader(name):
    before = set(torch.multiprocessing.active_children())
    with Loader(Failing("works"), 50, workers=1, prefetch=1) as batches:
        assert batches(0) == 0
        [worker] = set(torch.multiprocessing.active_children()) - before
        os.kill(worker.pid, getattr(signal, name))
        assert [batches(step) for step in range(1, 10)] == list(range(1, 10))
    assert not set(torch.multiprocessing.active_children()) - before


KILLED = """
import os, signal, sys
import torch.multiprocessing
from tests.helpers.failing import Failing
from dalle.data.dataloader import Loader
if __name__ == "__main__":
    torch.multiprocessing.set_start_method(sys.argv[1])
    batches = Loader(Failing("works"), 10**6, workers=2)
    batches(0)
    print(batches._stream._workers[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_end_when_the_training_is_killed(method, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, tmp_path / "killed.py", method]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as done:
        worker = int(done.stdout.readline())
        try:
            done.communicate(timeout=30)  # to the end of the output, which workers share; then it waits
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            pytest.fail("the worker is there half a minute later")


@dataclass(frozen=True)
class Touch:
    folder: Path

    def __call__(self, step):
        (self.folder / str(step)).touch()
        return step


def test_workers_prefetch_a_bounded_number_of_batches(tmp_path):
    with Loader(Touch(tmp_path), 100, workers=2, prefetch=2) as batches:
        for step in range(5):
            batches(step)
        assert len(list(tmp_path.iterdir())) <= 5 + 2 * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_each_bad_sample_is_named_once(tmp_path, workers):
    log = tmp_path / "bad_samples.jsonl"
    with ImageTextLoader(reader(10, bad=[2, 7]), 20, workers, log=log) as batches:  # six epochs
        for step in range(20):
            assert len(batches(step)[1]) == 3
        assert batches.bad_samples.counts == Counter({"unreadable image": 2})
    assert sorted(json.loads(line)["name"] for line in log.read_text().splitlines()) == ["m2", "m7"]


def test_too_many_bad_samples_end_a_run(tmp_path):
    broken = reader(160, [i for i in range(160) if i % 16 > 2], batch_size=40)
    log = tmp_path / "bad_samples.jsonl"
    with ImageTextLoader(broken, 4, log=log) as batches:
        with pytest.raises(
            ValueError, match=r"of 1\d\d samples .*more than 1\.0%.*unreadable image; each is named in"
        ):
            list(map(batches, range(4)))
        assert len(log.read_text().splitlines()) > 100
    with ImageTextLoader(broken, 4, max_bad_fraction=0.9) as batches:
        list(map(batches, range(4)))


# Trainings.


def run_of(tiny_runs, tmp_path, path, out, workers, steps=8):
    """Eight steps of four: an epoch of twenty, and more."""
    val = str(write_scenes_tar(tmp_path / "held-out.tar", {}))
    data = replace(tiny_runs.dvae.data, path=str(path), workers=workers, val_path=val)
    return replace(tiny_runs.dvae, data=data, out=tmp_path / out, steps=steps, eval_samples=2)


@pytest.mark.parametrize(("write", "workers"), [(write_scenes, 0), (write_scenes_tar, 2)])
def test_a_training_replaces_and_names_each_kind_of_bad_sample(tmp_path, tiny_runs, write, workers, capsys):
    bad = {i: cause for i, cause in BAD.items() if write is write_scenes_tar or cause != "broken tar member"}
    train_dvae(run_of(tiny_runs, tmp_path, write(tmp_path / "set.tar", bad), "run", workers))
    assert f"skipped {len(bad)} samples" in "".join(capsys.readouterr())
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert len(lines) == len(bad)
    assert {int(Path(line["name"]).stem): line["cause"] for line in lines} == bad
    steps = [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert steps == list(range(1, 9))


def test_a_resume_with_other_workers_gives_the_same_weights(tmp_path, tiny_runs):
    tar = write_scenes_tar(tmp_path / "set.tar", BAD)
    for out, workers, steps in (("whole", 0, 8), ("parts", 2, 3), ("parts", 1, 8)):
        train_dvae(run_of(tiny_runs, tmp_path, tar, out, workers, steps))
    folders = [tmp_path / out for out in ("whole", "parts")]
    weights = [(latest_checkpoint(folder) / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    logs = [(folder / "bad_samples.jsonl").read_text().splitlines() for folder in folders]
    assert sorted(logs[0]) == sorted(logs[1])


def test_replacements_are_spread_and_depend_on_seed_epoch_and_index_alone():
    dataset = reader(50, bad=range(10, 20)).dataset
    batch = dataset.load([(0, index) for index in range(50)], replace=True)
    taken = [index for _, index in batch.samples]
    assert len(batch.pixels) == len(batch.captions) == 50
    assert taken[:10] + taken[20:] == [*range(10), *range(20, 50)]
    assert not set(taken) & set(range(10, 20))
    assert len(set(taken[10:20])) > 5  # not one neighbor for the whole range
    assert {bad.index for bad in batch.skipped} == set(range(10, 20))
    [one], [again], [epoch], [seed] = (
        dataset.load([(e, 13)], seed=s, replace=True).samples for e, s in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert one == again
    assert len({one[1], epoch[1], seed[1]}) > 1


def test_one_caption_is_sampled_for_each_epoch():
    dataset = reader(4).dataset
    sampled = [sample_captions(dataset.load([(epoch, 2)]), seed=1)[0] for epoch in range(60)]
    assert set(sampled) == set(dataset.captions([2])[0])
    assert sampled == [sample_captions(dataset.load([(epoch, 2)]), seed=1)[0] for epoch in range(60)]

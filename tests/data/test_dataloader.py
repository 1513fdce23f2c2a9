"""Batches ahead of time and what is skipped on the way (dalle/data: loader, skipped, pairs, decode)."""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.commands.train_dvae import train_dvae
from dalle.data import (
    BatchReader,
    DataConfig,
    ImageTextLoader,
    Loader,
    first_samples,
    open_dataset,
    sample_captions,
)
from dalle.data.bad_samples import CAUSES, BadSampleError, BadSampleLog
from dalle.data.dataset import ImageTextDataset
from dalle.data.image_decode import decode, open_image
from dalle.data.transforms import transform
from dalle.io.rng import epoch_stream, generator
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.loggers import read_log
from dalle.types import BadSample, RawSample
from tests.helpers.failing import Failing


def encoded(form="PNG", size=(24, 20), seed=0, **options) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, form, **options)
    return buffer.getvalue()


class Memory:
    """A source in memory: sample i is good unless it is named in `bad`."""

    def __init__(self, size: int, bad=()):
        self.size, self.bad, self.hash, self.skipped = size, set(bad), f"memory-{size}", []

    def __len__(self):
        return self.size

    def name(self, index):
        return f"m{index}"

    def shares(self):
        return np.arange(self.size, dtype=np.uint32) * np.uint32(2**32 // self.size)

    def captions(self, index):
        return [f"{index} one", f"{index} two", f"{index} three"]

    def read(self, index):
        return RawSample(
            self.name(index), b"" if index in self.bad else encoded(seed=index), self.captions(index)
        )


@dataclass(frozen=True)
class Sums:
    """A batch that is quick to compare: samples and a sum for each image."""

    def __call__(self, batch, step):
        return (
            step,
            list(batch.samples),
            torch.from_numpy(batch.pixels).sum((1, 2, 3)).tolist(),
            sample_captions(batch, 5),
        )


def pairs_of(size=10, bad=()):
    return ImageTextDataset(Memory(size, bad), 16)


def task(pairs=None, batch_size=3, **changes):
    return BatchReader(pairs or pairs_of(), batch_size, 7, "dvae", Sums(), **changes)


# Loader.


def stream(workers, first=0, steps=6, pairs=None, **options):
    with ImageTextLoader(task(pairs), steps, workers, **options) as batches:
        return [batches(step) for step in range(first, steps)]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_and_any_resume_gives_the_same_batches(workers):
    alone = stream(0)
    assert [step for step, *_ in alone] == list(range(6))
    assert stream(workers) == alone
    assert stream(workers, first=4) == alone[4:]  # more than an epoch on


def test_more_workers_than_batches_are_no_harm():
    assert stream(5, steps=2) == stream(0, steps=2)


def test_spawned_workers_give_the_same_batches():
    with Loader(task(), 2, workers=1, start_method="spawn") as batches:
        assert [batches(step)[0] for step in range(2)] == stream(0, steps=2)


def test_starting_workers_draws_nothing_from_the_generator_of_the_training():
    state = torch.get_rng_state()
    stream(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_out_of_turn_is_given_all_the_same():
    alone = stream(0)
    with ImageTextLoader(task(), 6, workers=2) as batches:
        assert [batches(step) for step in (3, 4, 0, 0, 5)] == [alone[step] for step in (3, 4, 0, 0, 5)]


def test_the_ranks_together_load_the_step_of_one():
    whole = task(batch_size=4)(2)[0]
    halves = [task(batch_size=4, rank=rank, world=2)(2)[0] for rank in range(2)]
    assert halves[0][1] + halves[1][1] == whole[1]
    assert halves[0][2] + halves[1][2] == whole[2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_comes_out_of_a_worker_as_one_sentence(workers):
    with Loader(Failing("raises"), 3, workers) as batches:
        assert batches(0) == 0
        with pytest.raises(ValueError, match=r"^row 7 of the table is upside down$"):
            batches(1)


def test_a_worker_that_dies_is_named():
    said = r"no data for step \d: .*pid.*lower --data\.workers"
    with (
        Loader(Failing("dies"), 3, workers=1, prefetch=1) as batches,
        pytest.raises(RuntimeError, match=said),
    ):
        list(map(batches, range(3)))


def test_a_worker_that_hangs_is_named_and_ended():
    before = set(torch.multiprocessing.active_children())
    said = r"no data for step 2: worker 1 \(pid \d+\) hangs: nothing in 2 s\."
    with Loader(Failing("hangs"), 3, workers=2, prefetch=1, timeout=2) as batches:
        assert batches(0) == 0
        with pytest.raises(RuntimeError, match=said):
            batches(1)
    assert not set(torch.multiprocessing.active_children()) - before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_workers_outlive_a_signal_that_is_for_the_training(name):
    with Loader(Failing("works"), 50, workers=1, prefetch=1) as batches:
        assert batches(0) == 0
        for worker in batches._stream._workers:
            os.kill(worker.pid, getattr(signal, name))
        assert [batches(step) for step in range(1, 10)] == list(range(1, 10))


def test_workers_end_with_the_loader():
    before = set(torch.multiprocessing.active_children())
    with ImageTextLoader(task(), 100, workers=2) as batches:
        batches(0)
        started = set(torch.multiprocessing.active_children()) - before
        assert len(started) == 2
    assert not started & set(torch.multiprocessing.active_children())


KILLED = """
import os, signal, sys
from tests.helpers.failing import Failing
from dalle.data.dataloader import Loader
if __name__ == "__main__":
    batches = Loader(Failing("works"), 10**6, workers=1, start_method=sys.argv[1])
    batches(0)
    print(batches._stream._workers[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix" or not shutil.which("ps"), reason="needs POSIX and ps")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_when_the_training_is_killed(method, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))}
    command = [sys.executable, tmp_path / "killed.py", method]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as done:
        worker = int(done.stdout.readline())
    for _ in range(300):
        if not alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("it is there half a minute later")


def alive(pid: int) -> bool:
    """A zombie, which nobody has waited for yet, is none."""
    return (
        subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout[:1]
        not in "Z"
    )


@dataclass(frozen=True)
class Noting:
    place: Path

    def __call__(self, step):
        (self.place / str(step)).touch()
        return step


def test_workers_stay_a_bounded_number_of_batches_ahead(tmp_path):
    with Loader(Noting(tmp_path), 100, workers=2, prefetch=2) as batches:
        for step in range(5):
            batches(step)
        assert len(list(tmp_path.iterdir())) <= 5 + 2 * 2


# What is skipped.


def test_a_broken_sample_is_replaced_by_another_of_the_set():
    pairs = pairs_of(50, bad=range(10, 20))
    batch = pairs.load([(0, index) for index in range(50)], replace=True)
    assert len(batch.samples) == len(batch.pixels) == len(batch.captions) == 50
    taken = [index for _, index in batch.samples]
    assert taken[:10] + taken[20:] == [*range(10), *range(20, 50)]
    assert not set(taken) & set(range(10, 20))
    assert len(set(taken[10:20])) > 5  # not one good neighbour for a whole stretch
    assert {skip.index for skip in batch.skipped} == set(range(10, 20))


def test_what_replaces_a_sample_depends_on_seed_epoch_and_index_alone():
    pairs = pairs_of(50, bad=[3])
    [one], [again], [epoch], [seed] = (
        pairs.load([(e, 3)], seed=s, replace=True).samples for e, s in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert one == again
    assert len({one[1], epoch[1], seed[1]}) > 1


def test_a_sample_that_is_not_replaced_is_left_out():
    batch = pairs_of(5, bad=[1]).load([(0, 0), (2, 1), (2, 2)])
    assert batch.samples == [(0, 0), (2, 2)]
    assert batch.captions[1] == ["2 one", "2 two", "2 three"]
    assert batch.skipped == [BadSample(1, "m1", "truncated", "no bytes")]


def test_a_set_without_a_usable_sample_ends_with_examples():
    with pytest.raises(ValueError, match=r"no usable sample among 5 tried: 5: 5 truncated; for example m"):
        pairs_of(5, bad=range(5)).load([(0, 0)], replace=True)
    with pytest.raises(ValueError, match="no usable sample to evaluate on: 5: 5 truncated"):
        first_samples(pairs_of(5, bad=range(5)), 2)


def test_the_first_pairs_are_the_first_usable_ones(capsys):
    batch = first_samples(pairs_of(8, bad=[0, 2]), 4)
    assert batch.samples == [(0, 1), (0, 3), (0, 4), (0, 5)]
    assert len(batch.pixels) == len(batch.captions) == 4
    assert len(first_samples(pairs_of(3), 10).samples) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_each_skipped_sample_is_named_once_whoever_met_it(tmp_path, workers):
    log = tmp_path / "bad_samples.jsonl"
    with ImageTextLoader(task(pairs_of(10, bad=[2, 7])), 20, workers, log=log) as batches:  # six epochs
        for step in range(20):
            assert len(batches(step)[1]) == 3
        assert batches.bad_samples.counts == Counter({"truncated": 2})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == ["m2", "m7"]
    assert {line["cause"] for line in lines} == {"truncated"}


def test_a_resumed_run_goes_on_with_its_list(tmp_path):
    log = tmp_path / "bad_samples.jsonl"
    opening = [BadSample(None, "x.png", "missing twin")]
    for _ in range(2):
        skipped = BadSampleLog(log, 1000, opening)
        skipped.add([BadSample(4, "m4", "truncated")], 5, 10)
    skipped.add([BadSample(5, "m5", "empty caption")], 6, 20)
    assert skipped.counts == Counter({"missing twin": 1, "truncated": 1, "empty caption": 1})
    with log.open("a") as file:
        file.write('{"index": 6, "na')  # a run that died
    again = BadSampleLog(log, 1000, opening)
    again.add([], 7, 30)
    assert again.counts == skipped.counts
    again.add([BadSample(7, "m7", "truncated")], 7, 30)
    assert [json.loads(line)["name"] for line in log.read_text().splitlines()] == ["x.png", "m4", "m5", "m7"]
    assert str(skipped).startswith(
        "skipped 3 samples: 1 missing twin, 1 truncated, 1 empty caption; each is named in"
    )


def test_a_run_that_begins_again_forgets_the_list_of_the_one_before(tmp_path):
    log = tmp_path / "bad_samples.jsonl"
    BadSampleLog(log, 1000).add([BadSample(4, "of another set", "truncated")], 0, 10)
    BadSampleLog(log, 1000).add([], 0, 10)
    assert log.read_text() == ""


def test_nothing_is_written_when_nothing_is_skipped(tmp_path):
    skipped = BadSampleLog(tmp_path / "bad_samples.jsonl", 10)
    skipped.add([], 0, 5)
    assert not (tmp_path / "bad_samples.jsonl").exists()
    assert str(skipped) == "skipped 0 samples"


def skips(count, cause="truncated"):
    return [BadSample(i, f"m{i}", cause) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "seen", "stops"), [(101, 10_000, True), (101, 10_101, False), (100, 100, False)]
)
def test_a_run_ends_above_one_percent_and_a_hundred_samples(count, seen, stops):
    skipped = BadSampleLog(None, 10**6)
    if not stops:
        return skipped.add(skips(count), 0, seen)
    with pytest.raises(
        ValueError, match=r"101 of 10000 samples cannot be used \(1\.0%, more than 1\.0%\): skipped 101"
    ):
        skipped.add(skips(count), 0, seen)


def test_the_samples_seen_are_those_of_the_set_at_most():
    with pytest.raises(ValueError, match="101 of 500 samples"):
        BadSampleLog(None, 500).add(skips(101), 9, 10**6)  # many epochs do not thin them out


def test_a_sample_read_in_place_of_another_counts_as_seen():
    with pytest.raises(ValueError, match=r"101 of 151 samples cannot be used \(66\.9%"):
        BadSampleLog(None, 10**6).add(
            skips(101), 0, 50, replaced=True
        )  # fifty asked for, and so many tried to find them
    BadSampleLog(None, 10**6).add(skips(101), 0, 9_999, replaced=True)


def test_what_a_filter_drops_never_ends_a_run():
    skipped = BadSampleLog(None, 1000)
    skipped.add(skips(900, "filter:aspect"), 0, 1000)
    assert skipped.counts["filter:aspect"] == 900


def test_much_that_is_broken_is_said_when_the_set_is_opened(tmp_path):
    for i in range(150):
        (tmp_path / f"{i}.png").write_bytes(b"")
    (tmp_path / "1.txt").write_text("the only caption")
    config = DataConfig(str(tmp_path), val_fraction=1e-9)
    with pytest.raises(
        ValueError, match=r"149 of 150 samples cannot be used .*149 missing twin; for example 0\.png"
    ):
        open_dataset(config)
    assert open_dataset(replace(config, max_bad_fraction=1.0)).size == 1


# Decoding.


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "truncated"),
        (b"<html>404</html>", "wrong type"),
        (b"%PDF-1.7", "wrong type"),
        (b"\x89PNG\r\n\x1a\nrubbish", "unreadable image"),
        (encoded("JPEG", (64, 64))[:600], "truncated"),
        (encoded("PNG", (64, 64))[:600], "truncated"),
        (encoded("GIF", (64, 64))[:1200], "truncated"),
        (encoded("WEBP", (64, 64))[:600], "unreadable image"),
        (b"\xff\xd8\xff\xe0", "unreadable image"),
    ],
)
def test_what_is_wrong_with_a_image_is_told_apart(data, cause):
    with pytest.raises(BadSampleError) as caught:
        decode(open_image(data, "a.png"), "a.png")
    assert (caught.value.name, caught.value.cause) == ("a.png", cause)
    assert cause in CAUSES


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadSampleError, match="decompression bomb"):
        open_image(encoded("PNG", (64, 64)), "a.png")


def png_that_says(width: int, height: int) -> bytes:
    """An image whose header promises any size."""
    data = bytearray(encoded("PNG", (8, 8)))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "bomb"),
    [((9459, 9459), False), ((10_000, 9_000), True), ((17_000, 10_000), True), ((60_000, 60_000), True)],
)
def test_a_image_of_more_than_ninety_megapixels_is_a_bomb(size, bomb):
    """Where Pillow only warns, and where it refuses."""
    if not bomb:
        assert open_image(png_that_says(*size), "a.png").size == size
        return
    with pytest.raises(BadSampleError, match=r"a\.png: decompression bomb \(.*pixels") as caught:
        open_image(png_that_says(*size), "a.png")
    assert caught.value.cause == "decompression bomb"


def test_a_warning_of_pillow_that_is_made_an_error_is_a_bomb_too():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSampleError, match="decompression bomb"):
            open_image(png_that_says(17_000, 10_000), "a.png")


def test_a_much_larger_jpeg_is_decoded_small_and_looks_the_same():
    y, x = np.mgrid[:1200, :1600] / 1200
    image = Image.fromarray((255 * np.stack([x / 1.34, y, 0.5 + 0 * x], -1)).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    small, whole = (decode(open_image(buffer.getvalue(), "a"), "a", side) for side in (128, None))
    assert (small.size, whole.size) == ((200, 150), (1600, 1200))
    difference = np.asarray(whole.resize((200, 150), Image.Resampling.BOX), int) - np.asarray(small, int)
    assert abs(difference).max() <= 4
    kept = decode(open_image(encoded("JPEG", (150, 100)), "a"), "a", 128)
    assert kept.size == (150, 100)  # half of it would be too small


@pytest.mark.parametrize("augment", ["dvae", "transformer"])
def test_a_large_jpeg_is_decoded_whole_unless_a_draft_is_asked_for(tmp_path, augment):
    big = encoded("JPEG", (200, 160))
    (tmp_path / "a.jpg").write_bytes(big)
    (tmp_path / "a.txt").write_text("noise")
    config = DataConfig(str(tmp_path), resolution=16, val_fraction=1e-9)
    pairs = [open_dataset(replace(config, jpeg_draft=asked)) for asked in (False, True)]
    whole, draft = (each.load([(0, 0)], augment, 3).pixels for each in pairs)
    for side, pixels in ((None, whole), (32, draft)):
        image = decode(open_image(big, "a"), "a", side)
        crop = transform(image, 16, augment, generator("crop", epoch_stream(3, 0), 0))
        np.testing.assert_array_equal(
            pixels[0], np.asarray(crop, np.float32).transpose(2, 0, 1) / np.float32(255)
        )
    assert abs(whole - draft).max() > 0.05
    looks = [each.load([(0, 0)]).pixels for each in pairs]
    np.testing.assert_array_equal(*looks)  # evaluation never takes a draft


def test_one_caption_is_drawn_for_each_epoch():
    pairs = pairs_of(4)
    drawn = [sample_captions(pairs.load([(epoch, 2)]), seed=1)[0] for epoch in range(60)]
    assert set(drawn) == set(pairs.captions([2])[0])
    assert drawn == [sample_captions(pairs.load([(epoch, 2)]), seed=1)[0] for epoch in range(60)]


# Whole runs.


BAD = {
    2: "truncated",
    5: "wrong type",
    9: "caption not UTF-8",
    12: "empty caption",
    17: "missing twin",
    14: "broken tar member",
}


def members(bad: dict[int, str]):
    """(name, bytes) of twenty pairs, some of them broken as said."""
    for i in range(20):
        data, text = encoded(size=(40, 36), seed=i), f"an image, number {i}".encode()
        data = {"truncated": data[:200], "wrong type": b"<html>"}.get(bad.get(i), data)
        text = {"caption not UTF-8": "schön".encode("latin-1"), "empty caption": b"\n"}.get(bad.get(i), text)
        yield f"{i:02}.png", data
        if bad.get(i) != "missing twin":
            yield f"{i:02}.txt", text


def write_folder(place: Path, bad: dict[int, str]) -> Path:
    place.mkdir()
    for name, data in members(bad):
        (place / name).write_bytes(data)
    return place


def write_tar(file: Path, bad: dict[int, str]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members(bad):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(file) as tar:  # only a tar that is read knows where its members lie
        damaged = [
            tar.getmember(f"{i:02}.png").offset for i, cause in bad.items() if cause == "broken tar member"
        ]
    data = bytearray(file.read_bytes())
    for at in damaged:
        data[at + 130] ^= 0xFF
    file.write_bytes(data)
    return file


def own_run(tiny_runs, tmp_path, path, out, workers, steps=8):
    """Eight steps of four: an epoch of twenty, and more."""
    there = tmp_path / "held-out"
    data = replace(
        tiny_runs.dvae.data,
        path=str(path),
        workers=workers,
        val_path=str(there if there.exists() else write_folder(there, {})),
    )
    return replace(tiny_runs.dvae, data=data, out=tmp_path / out, steps=steps, eval_samples=2)


@pytest.mark.parametrize(("form", "workers"), [(write_folder, 0), (write_tar, 2)])
def test_each_kind_of_broken_sample_is_trained_past_and_named(tmp_path, tiny_runs, form, workers):
    bad = {i: cause for i, cause in BAD.items() if form is write_tar or cause != "broken tar member"}
    train_dvae(own_run(tiny_runs, tmp_path, form(tmp_path / "set.tar", bad), "run", workers))
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert len(lines) == len(bad)
    assert {int(Path(line["name"]).stem): line["cause"] for line in lines} == bad
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line] == list(
        range(1, 9)
    )


def test_a_run_goes_on_with_another_number_of_workers_to_the_same_weights(tmp_path, tiny_runs):
    tar = write_tar(tmp_path / "set.tar", BAD)
    for out, workers, steps in (("whole", 0, 8), ("parts", 2, 3), ("parts", 1, 8)):
        train_dvae(own_run(tiny_runs, tmp_path, tar, out, workers, steps))
    models = [
        (latest_checkpoint(tmp_path / out) / "model.safetensors").read_bytes() for out in ("whole", "parts")
    ]
    assert models[0] == models[1]
    logs = [(tmp_path / out / "bad_samples.jsonl").read_text().splitlines() for out in ("whole", "parts")]
    assert sorted(logs[0]) == sorted(logs[1])

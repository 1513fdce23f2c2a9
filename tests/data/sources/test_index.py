"""Indexes of tars and tables: dalle/data/sources/index.py."""

import gc
import os
import pickle
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from dalle.data import DataConfig, open_dataset, open_source
from dalle.data.sources.index import FOLDER
from tests.helpers.formats import (
    COUNT,
    all_captions,
    caption,
    csv_file,
    one_tar,
    pair,
    tars,
    write_files,
    write_tar,
)

PROCESSES = 4
ROUNDS = 6


@pytest.mark.parametrize("form", ["csv", "tar"])
def test_a_sample_takes_a_few_bytes(tmp_path, form):
    """4 bytes for its index in the split: no name, no caption, no object."""

    def cost(count):
        path = tmp_path / f"{count}.{form}"
        if form == "tar":
            write_tar(path, [(f"{i:06}.{kind}", b"x") for i in range(count) for kind in ("png", "txt")])
        else:
            path.write_text("image,caption\n" + "".join(f"{i}.png,caption {i}\n" for i in range(count)))
        config = DataConfig(str(path), resolution=16, index_dir=str(tmp_path / "index"))
        assert len(pickle.dumps(open_source(path, index_dir=tmp_path / "index"))) < 2000
        tracemalloc.start()  # mapped files do not count
        splits = [open_dataset(config, split) for split in ("train", "val")]
        gc.collect()
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert sum(split.size for split in splits) == count
        return used

    cost(500)  # imports and caches
    assert (cost(5000) - cost(1000)) / 4000 < 14


def test_an_index_is_built_once_and_again_when_the_files_change(tmp_path):
    path, folder = one_tar(tmp_path), tmp_path / "index"
    first = open_source(path, index_dir=folder)
    [name] = os.listdir(folder)
    before = (folder / name).stat().st_mtime_ns
    open_source(path, index_dir=folder)
    assert (folder / name).stat().st_mtime_ns == before
    write_tar(path, pair("only", 1))
    second = open_source(path, index_dir=folder)
    assert (len(second), len(os.listdir(folder))) == (1, 2)
    assert first.hash != second.hash


def test_the_hash_is_of_the_content_not_of_path_or_time(tmp_path):
    for name in ("here", "there"):
        os.utime(one_tar(tmp_path / name), (1, 1 if name == "here" else 2))
    assert open_source(tmp_path / "here").hash == open_source(tmp_path / "there").hash


@pytest.mark.parametrize("length", [0, 5, 600, -1])  # 600 is in the records
@pytest.mark.parametrize("flipped", [False, True])
def test_a_damaged_index_is_built_again(tmp_path, length, flipped):
    path = one_tar(tmp_path)
    open_source(path, index_dir=tmp_path / "index")
    [index] = (tmp_path / "index").iterdir()
    whole = index.read_bytes()
    flip = bytearray(whole)
    flip[length] ^= 4
    index.write_bytes(flip if flipped else whole[:length])
    assert all_captions(open_source(path, index_dir=tmp_path / "index")) == [caption(i) for i in range(COUNT)]
    assert index.read_bytes() == whole


def test_an_interrupted_index_leaves_nothing(tmp_path, monkeypatch):
    path = one_tar(tmp_path)
    monkeypatch.setattr("dalle.data.sources.webdataset.scan_tar", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_source(path, index_dir=tmp_path / "index")
    assert os.listdir(tmp_path / "index") == []


def test_an_unreadable_file_leaves_one_partial_index(tmp_path):
    (tars(tmp_path) / "set-003.tar").symlink_to("nowhere")
    for _ in range(3):
        assert len(open_source(tmp_path, index_dir=tmp_path / "index")) == COUNT
    assert len(os.listdir(tmp_path / "index")) == 1


def test_an_index_is_beside_the_data_or_in_the_users_cache(tmp_path, monkeypatch):
    open_source(one_tar(tmp_path))
    assert len(os.listdir(tmp_path / FOLDER)) == 1
    write_files(tmp_path / "set", {FOLDER: "in the way"})
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert len(open_source(one_tar(tmp_path / "set"))) == COUNT
    assert len(os.listdir(tmp_path / "home" / ".cache" / "dalle")) == 1
    with pytest.raises(ValueError, match=r"cannot write an index to .*--data\.index-dir"):
        open_source(tmp_path / "all.tar", index_dir=tmp_path / "set" / FOLDER)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home directory")))
    open_source(tmp_path / "all.tar")


@pytest.mark.parametrize("damaged", [False, True], ids=["new", "damaged"])
@pytest.mark.parametrize("form", [tars, csv_file])
def test_processes_that_index_at_once_end_with_one_index(tmp_path, form, damaged):
    path = form(tmp_path / "set")
    source = open_source(path, index_dir=tmp_path / "first")
    with ProcessPoolExecutor(PROCESSES) as pool:
        for number in range(ROUNDS):
            index = tmp_path / f"index-{number}" / source._index.path.name
            if damaged:
                write_files(index.parent, {index.name: '{"start": 12, "en'})
            found = pool.map(partial(open_source, index_dir=index.parent), [path] * PROCESSES)
            opened = [(each.hash, each._index.path, all_captions(each)) for each in found]
            assert opened == [(source.hash, index, all_captions(source))] * PROCESSES
            assert os.listdir(index.parent) == [index.name]  # no partial index is left
    assert not (path.parent / FOLDER).exists()

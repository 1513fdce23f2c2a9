"""Detection of format, files and splits at a path: dalle/data/sources/detect.py."""

import pytest

from dalle.data import open_source
from dalle.data.config import DataConfig
from dalle.data.dataset import open_dataset
from dalle.data.sources import detect_source, has_val_split
from dalle.data.sources.detect import expand_braces
from tests.helpers.formats import (
    COUNT,
    csv_file,
    folder,
    image,
    one_tar,
    pair,
    skipped,
    tars,
    write_files,
    write_tar,
)


def test_braces_keep_leading_zeros():
    assert list(expand_braces("a-{08..10}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert list(expand_braces("{a,b}/{0..1}")) == ["a/0", "a/1", "b/0", "b/1"]


@pytest.mark.parametrize(
    "pattern", ["set-{000..002}.tar", "set-*.tar", "set-00[0-2].tar", "*-{000,001,002}.tar"]
)
@pytest.mark.parametrize("folder", ["data", "data [v2]", "{1} ?"])
def test_patterns_name_tars(tmp_path, folder, pattern):
    (tmp_path / folder).mkdir()
    tars(tmp_path / folder)
    source = open_source(f"{tmp_path}/{folder}/{pattern}")
    assert (len(source), source.hash) == (COUNT, open_source(tmp_path / folder).hash)


def test_brackets_are_literal_if_that_exists(tmp_path):
    for name in ("a [1].tar", "a [2].tar", "a 1.tar"):
        write_tar(tmp_path / name, pair("a", 1))
    found = [detect_source(f"{tmp_path}/a [{end}.tar").files for end in ("1]", "{1,2}]", "*", "12]")]
    assert list(map(len, found)) == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("set-{000..003}.tar", r"no file .*set-003\.tar"),
        ("other-*.tar", r"no file matches .*other-\*\.tar"),
        ("nowhere", "nothing at .*nowhere"),
        ("image.png", r"is \.png; expected a folder of images"),
        ("set.tar.gz", r"is \.gz; .*not compressed"),
        ("both", r"several formats \(\.csv, \.jsonl\)"),
        ("set-{000..999999999}.tar", r"no file .*set-003\.tar"),
        ("~nobody-of-this-name/set.tar", "nothing at"),
        ("x" * 300, "cannot read x.*File name too long"),
        ("s3://bucket/set.tar", r"s3://bucket/set\.tar is not on a disk"),
    ],
)
def test_other_paths_are_refused(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tars(tmp_path))
    csv_file(tmp_path / "both")
    write_files(tmp_path, {"image.png": "something", "set.tar.gz": "something", "both/more.jsonl": "{}"})
    with pytest.raises(ValueError, match=words):
        detect_source(path)


def test_what_is_beside_tars_is_counted(tmp_path):
    others = {"a.png": image(1), "a.txt": "w", "set-003.tgz": "", "test.tar": "", ".h": ""}
    write_files(tars(tmp_path), others)
    (tmp_path / "set-004.tar").symlink_to("nowhere")
    source = open_source(tmp_path)
    unused = [(name, "unused file") for name in ("a.png", "a.txt", "set-003.tgz", "test.tar")]
    assert (len(source), skipped(source)) == (COUNT, [("set-004.tar", "unreadable shard"), *unused])


def test_a_table_among_captioned_images_is_ignored_unless_asked_for(tmp_path):
    write_files(folder(tmp_path), {"list.csv": "image,caption\np000.png,other\n"})
    assert detect_source(str(tmp_path)).format == "folder"
    assert open_source(tmp_path, "table").read(0).captions == ["other"]
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    assert detect_source(str(tmp_path)).format == "table"


@pytest.mark.parametrize("name", ["val.tar", "val-000.tar", "Validation_0.tar", "dev.tar", "held-out.tar"])
def test_files_named_for_validation_are_its_split(tmp_path, name):
    tars(tmp_path)
    write_tar(tmp_path / name, pair("a", 1) + pair("b", 2))
    write_tar(tmp_path / "test-000.tar", pair("c", 3))
    config = DataConfig(str(tmp_path), resolution=16)
    assert has_val_split(str(tmp_path))
    assert (open_dataset(config).size, open_dataset(config, "val").size) == (COUNT, 2)
    assert len(open_source(tmp_path)) == COUNT + 2  # without the test split


def test_other_names_are_no_validation_split(tmp_path):
    for name in ("valley.tar", "device.tar", "interval-0.tar"):
        write_tar(tmp_path / name, pair("a", 1))
    assert not has_val_split(str(tmp_path))


def test_the_validation_split_may_be_elsewhere(tmp_path):
    tar, table = one_tar(tmp_path / "train"), csv_file(tmp_path / "other")
    config = DataConfig(str(tar), resolution=16, val_path=str(table))
    train, val = open_dataset(config), open_dataset(config, "val")
    assert (train.size, val.size, val.name(0)) == (COUNT, COUNT, "images/p000.png")


def test_splits_of_a_hub_dataset_are_its_parts(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": image(i), "path": None} for i in range(4)], "text": ["a"] * 4}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    splits = datasets.DatasetDict({"train": dataset, "validation": dataset.select([0])})
    splits.save_to_disk(str(tmp_path / "set"))
    config = DataConfig(str(tmp_path / "set"), resolution=16)
    assert (open_dataset(config).size, open_dataset(config, "val").size) == (4, 1)


@pytest.mark.parametrize("write", [folder, one_tar])
def test_a_missing_split_is_refused(tmp_path, write):
    path = write(tmp_path)
    with pytest.raises(ValueError, match="no validation split"):
        open_source(path, part="val")
    assert len(open_source(path, part="train")) == COUNT

"""Tables as people and programs write them: other systems' paths, odd columns, captions in bytes
(data/sources)."""

import csv
import json
import os
from pathlib import Path

import pytest

from dalle.data import DataConfig, open_dataset
from dalle.data.bad_samples import BadSampleError
from dalle.data.sources import open_source
from tests.helpers.formats import caption, image

pytestmark = pytest.mark.skipif(os.sep != "/", reason="a backslash is a letter of a name")


def table(place: Path, rows: list[dict], form: str = "jsonl") -> Path:
    """Rows as a CSV, a JSONL or a Parquet file."""
    path = place / f"pairs.{form}"
    if form == "parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def put(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image(level))


# Paths.


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_paths_written_on_windows_are_found(tmp_path, form):
    put(tmp_path / "cats" / "a b" / "1.png", 1)
    source = open_source(table(tmp_path, [{"image": "cats\\a b\\1.png", "caption": "one"}], form))
    assert source.read(0).image == image(1)
    assert source.name(0) == "cats/a b/1.png"


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_image_is_in_the_same_part_whatever_system_its_table_is_from(tmp_path, form):
    shares = []
    for mark in "\\/":
        rows = [{"image": f"cats{mark}{i}.png", "caption": "one"} for i in range(9)]
        shares.append(open_source(table(tmp_path, rows, form)).shares().tolist())
    assert shares[0] == shares[1]


def test_a_file_whose_name_holds_a_backslash_is_that_file(tmp_path):
    put(tmp_path / "a\\b.png", 1)
    put(tmp_path / "a" / "b.png", 2)
    rows = [{"image": "a\\b.png", "caption": "x"}, {"image": "a/b.png", "caption": "x"}]
    source = open_source(table(tmp_path, rows))
    assert [source.read(i).image for i in range(2)] == [image(1), image(2)]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("..\\secret.png", "leaves the folder"),
        ("cats\\..\\..\\secret.png", "leaves the folder"),
        ("cats/../../secret.png", "leaves the folder"),
        ("out/secret.png", "leaves the folder"),
        ("out\\secret.png", "leaves the folder"),
        ("C:\\images\\secret.png", "missing twin"),
        ("secret.png\0.jpg", "missing twin"),
    ],
)
def test_no_path_of_a_table_leads_out_of_its_folder(tmp_path, form, path, cause):
    """`out` is a link within the folder to the place above it."""
    put(tmp_path / "secret.png", 1)
    (tmp_path / "set" / "cats").mkdir(parents=True)
    (tmp_path / "set" / "out").symlink_to(tmp_path, target_is_directory=True)
    source = open_source(table(tmp_path / "set", [{"image": path, "caption": "a secret"}], form))
    with pytest.raises(BadSampleError, match=cause):
        source.read(0)


def test_no_path_of_a_hub_set_leads_out_of_its_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    put(tmp_path / "secret.png", 1)
    paths = ["../secret.png", str(tmp_path / "secret.png"), "..\\secret.png"]
    datasets.Dataset.from_dict({"image": paths, "text": ["a secret"] * 3}).save_to_disk(str(tmp_path / "set"))
    source = open_source(tmp_path / "set")
    for number in range(3):
        with pytest.raises(BadSampleError, match="leaves the folder"):
            source.read(number)


# Columns.


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_columns_of_the_same_name_are_refused_by_name(tmp_path, form):
    mark = "," if form == "csv" else "\t"
    lines = [["image", "caption", "Caption", " caption ", "image"], ["a.png", "one", "two", "three", "b.png"]]
    (tmp_path / f"a.{form}").write_text("\n".join(mark.join(line) for line in lines))
    with pytest.raises(
        ValueError, match=rf"a\.{form} has several columns named 'image', 'caption'; rename all"
    ):
        open_source(tmp_path)


def test_columns_of_the_same_name_in_parquet_are_refused_by_name(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = [pa.array(["a.png"]), pa.array(["one"]), pa.array(["two"])]
    parquet.write_table(pa.Table.from_arrays(columns, ["image", "text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has several columns named 'text'; rename all but one"):
        open_source(tmp_path)


def test_columns_without_a_name_are_no_harm(tmp_path):
    """As a spreadsheet leaves them behind the last one."""
    (tmp_path / "a.csv").write_text("image,caption,,\na.png,one,,\n")
    assert open_source(tmp_path).captions(0) == ["one"]


def test_a_first_line_beyond_all_measure_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('image,"caption\n' + "a.png,words\n" * 20_000)
    with pytest.raises(
        ValueError, match=r"the first line of .*a\.csv cannot be read .*it must name the columns"
    ):
        open_source(tmp_path)


FULL = {"image": "b.png", "caption": "two"}


@pytest.mark.parametrize(
    ("first", "found", "left_out"),
    [
        ({"licence": "CC0"}, [["two"]], ["a.jsonl:1"]),  # neither column
        ({}, [["two"]], ["a.jsonl:1"]),
        ({"caption": "alone"}, [["two"]], ["a.jsonl:1"]),  # no image
        ({"image": "a.png"}, [[], ["two"]], []),  # no caption: named when it is read
    ],
)
def test_a_first_line_may_lack_the_columns(tmp_path, first, found, left_out):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [first, FULL])))
    source = open_source(tmp_path)
    assert [source.captions(i) for i in range(len(source))] == found
    assert [(skip.name, skip.cause) for skip in source.skipped] == [
        (name, "missing twin") for name in left_out
    ]


def test_lines_that_lack_their_captions_are_named_in_training(tmp_path):
    put(tmp_path / "a.png", 1)
    put(tmp_path / "b.png", 2)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [{"image": "a.png"}, FULL])))
    pairs = open_dataset(DataConfig(str(tmp_path), resolution=16, val_path=str(tmp_path)))
    skipped = pairs.load([(0, 0), (0, 1)]).skipped
    assert [(skip.name, skip.cause) for skip in skipped] == [("a.png", "empty caption")]


def test_columns_that_no_line_has_are_asked_for_with_all_that_are_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"y": 2}\n{broken\n{"x": 1, "z": 3}\n')
    with pytest.raises(
        ValueError, match="has no column with a usual name for images, only 'x', 'y', 'z'; name it"
    ):
        open_source(tmp_path)


def test_columns_are_looked_for_in_so_many_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle.data.sources.table.HEAD_ROWS", 3)
    lines = ['{"x": 1}'] * 3 + [json.dumps(FULL)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="has no column with a usual name for images, only 'x'"):
        open_source(tmp_path)
    monkeypatch.setattr("dalle.data.sources.table.HEAD_ROWS", 4)
    assert open_source(tmp_path).captions(0) == ["two"]


# Captions in bytes.


@pytest.mark.parametrize("kind", ["binary", "large_binary", "list"])
def test_captions_that_parquet_keeps_as_bytes_are_read(tmp_path, kind):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    put(tmp_path / "a.png", 1)
    kinds = {"binary": pa.binary(), "large_binary": pa.large_binary(), "list": pa.list_(pa.binary())}
    texts = [caption(3)[1].encode(), "猫 قط".encode(), b"caf\xe9", None]
    values = [[text] for text in texts] if kind == "list" else texts
    columns = {"path": pa.array(["a.png"] * 4), "caption": pa.array(values, kinds[kind])}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_source(tmp_path)
    assert [source.captions(i) for i in (0, 1, 3)] == [["größe 3"], ["猫 قط"], []]
    with pytest.raises(BadSampleError, match=r"a\.png: caption not UTF-8"):
        source.read(2)


def test_captions_that_a_hub_set_keeps_as_bytes_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": image(i), "path": None} for i in range(2)],
        "text": ["größe".encode(), b"caf\xe9"],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("binary")})
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "set"))
    source = open_source(tmp_path / "set")
    assert source.read(0).captions == source.captions(0) == ["größe"]
    with pytest.raises(BadSampleError, match=r"row 1: caption not UTF-8"):
        source.read(1)


def test_paths_may_be_a_category(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    put(tmp_path / "a.png", 1)
    columns = {"path": pa.array(["a.png", "a.png"]).dictionary_encode(), "caption": pa.array(["one", "two"])}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_source(tmp_path)
    assert [(record.image, record.captions) for record in map(source.read, range(2))] == [
        (image(1), ["one"]),
        (image(1), ["two"]),
    ]

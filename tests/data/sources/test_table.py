"""Tables: CSV, TSV, JSONL, Parquet, and rows of Hugging Face datasets:
dalle/data/sources/{table,hf_datasets}.py."""

import csv
import json
import os
from pathlib import Path

import pytest

from dalle.data import DataConfig, open_dataset, open_source
from dalle.data.bad_samples import BadSampleError
from tests.helpers.formats import (
    all_captions,
    csv_file,
    image,
    jsonl_file,
    level,
    names,
    parquet_bytes,
    skipped,
    write_files,
    write_parquet,
)

pytestmark = pytest.mark.skipif(os.sep != "/", reason="a backslash is a letter of a name")
TABLES = ["csv", "jsonl", "parquet"]


def table(place: Path, rows: list[dict], form: str = "jsonl") -> Path:
    path = place / f"pairs.{form}"
    if form == "parquet":
        return write_parquet(path, {name: [row[name] for row in rows] for name in rows[0]})
    if form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([list(rows[0]), *(row.values() for row in rows)])
    return path


def text_table(place: Path, text: str, form: str = "csv") -> Path:
    (place / f"a.{form}").write_text(text)
    return place / f"a.{form}"


# Paths.


@pytest.mark.parametrize("form", TABLES)
def test_paths_of_windows_mean_the_same_samples(tmp_path, form):
    write_files(tmp_path, {"cats/a b/1.png": image(1)})
    sources = []
    for mark in "\\/":
        rows = [{"image": f"cats{mark}a b{mark}{i}.png", "caption": "one"} for i in range(1, 9)]
        sources.append(open_source(table(tmp_path, rows, form)))
        assert (sources[-1].read(0).image, sources[-1].name(0)) == (image(1), "cats/a b/1.png")
    assert sources[0].shares().tolist() == sources[1].shares().tolist()


def test_a_file_name_may_hold_a_backslash(tmp_path):
    write_files(tmp_path, {"a\\b.png": image(1), "a/b.png": image(2)})
    source = open_source(table(tmp_path, [{"image": f"a{mark}b.png", "caption": "x"} for mark in "\\/"]))
    assert [source.read(i).image for i in range(2)] == [image(1), image(2)]


OUTSIDE = ["../secret.png", "/etc/passwd", "link.png", "cats/../../secret.png", "out/secret.png"]
OUTSIDE += ["..\\secret.png", "cats\\..\\..\\secret.png", "out\\secret.png"]
NOWHERE = ["C:\\images\\secret.png", "secret.png\0.jpg"]


@pytest.mark.parametrize("form", TABLES)
def test_no_path_leads_out_of_the_folder(tmp_path, form):
    write_files(tmp_path, {"secret.png": image(1), "set/cats/a.png": image(1)})
    (tmp_path / "set" / "out").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [{"image": path, "caption": "a secret"} for path in OUTSIDE + NOWHERE]
    source = open_source(table(tmp_path / "set", rows, form))
    assert len(source) == len(rows)
    for index in range(len(rows)):
        cause = "leaves the folder" if index < len(OUTSIDE) else "missing twin"
        with pytest.raises(BadSampleError, match=cause):
            source.read(index)


def test_no_path_of_a_hub_dataset_leads_out_of_its_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_files(tmp_path, {"secret.png": image(1)})
    paths = ["../secret.png", str(tmp_path / "secret.png"), "..\\secret.png"]
    datasets.Dataset.from_dict({"image": paths, "text": ["a secret"] * 3}).save_to_disk(str(tmp_path / "set"))
    source = open_source(tmp_path / "set")
    for number in range(3):
        with pytest.raises(BadSampleError, match="leaves the folder"):
            source.read(number)


def test_image_root(tmp_path):
    path = csv_file(tmp_path)
    (tmp_path / "lists").mkdir()
    path = path.rename(tmp_path / "lists" / "pairs.csv")
    with pytest.raises(BadSampleError, match=r"images/p000\.png: missing twin"):
        open_source(path).read(0)
    assert level(open_source(path, image_root=tmp_path).read(5).image) == 5


def test_rows_of_the_same_image_are_in_one_split(tmp_path):
    rows = [f"p{i % 10}.png,caption {i}" for i in range(50)]
    config = DataConfig(str(text_table(tmp_path, "image,caption\n" + "\n".join(rows))), val_fraction=0.5)
    splits = [open_dataset(config, split) for split in ("train", "val")]
    parts = [{split.name(i) for i in range(split.size)} for split in splits]
    assert not parts[0] & parts[1]
    assert sum(split.size for split in splits) == 50


# Columns.


@pytest.mark.parametrize("form", [csv_file, jsonl_file, parquet_bytes])
def test_a_missing_column_is_named_with_those_there(tmp_path, form):
    path = form(tmp_path)
    with pytest.raises(ValueError, match=r"no column 'photo', only .*--data\.image-column"):
        open_source(path, image_column="photo")
    with pytest.raises(ValueError, match=r"no column 'words', only .*--data\.caption-column"):
        open_source(path, caption_column="words")


@pytest.mark.parametrize(
    ("form", "text", "words"),
    [
        ("csv", "x,y\n1,2\n", "usual name for images, only 'x', 'y'"),
        ("jsonl", '{"x": 1}\n{"y": 2}\n{broken\n{"x": 1, "z": 3}\n', "only 'x', 'y', 'z'"),
        ("csv", "image,caption,Caption, caption ,image\na,b,c,d,e\n", "'image', 'caption'; rename"),
        ("tsv", "image\tcaption\tCaption\t caption \timage\na\tb\tc\td\te\n", "'image', 'caption'; rename"),
        ("csv", 'image,"caption\n' + "a.png,words\n" * 20_000, "must name the columns"),
    ],
)
def test_unclear_columns_are_refused(tmp_path, form, text, words):
    with pytest.raises(ValueError, match=words):
        open_source(text_table(tmp_path, text, form))


def test_repeated_columns_in_parquet_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", [["a.png"], ["one"], ["two"]], ["image", "text", "text"])
    with pytest.raises(ValueError, match="several columns named 'text'"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("first", "found"),
    [
        ({"licence": "CC0"}, [["two"]]),  # neither column
        ({}, [["two"]]),
        ({"caption": "alone"}, [["two"]]),  # no image
        ({"image": "a.png"}, [[], ["two"]]),  # no caption: bad when it is read
    ],
)
def test_a_first_line_may_lack_the_columns(tmp_path, first, found):
    source = open_source(table(tmp_path, [first, {"image": "b.png", "caption": "two"}]))
    assert all_captions(source) == found
    assert skipped(source) == ([] if "image" in first else [("pairs.jsonl:1", "missing twin")])


def test_columns_are_searched_in_the_first_rows_only(tmp_path, monkeypatch):
    path = table(tmp_path, [{"x": 1}] * 3 + [{"image": "b.png", "caption": "two"}])
    monkeypatch.setattr("dalle.data.sources.table.HEAD_ROWS", 3)
    with pytest.raises(ValueError, match="only 'x'"):
        open_source(path)


# Rows.


@pytest.mark.parametrize(
    ("form", "text", "captions"),
    [
        ("csv", 'caption,image\n"a ""red"" dog,\non grass",a\n', ['a "red" dog,\non grass']),
        ("csv", 'caption,image\n5" pipe,a\n', ['5" pipe']),
        ("tsv", 'image\tcaption\na\t5" pipe\na\t"so called" dog\n', ['5" pipe', '"so called" dog']),
        ("tsv", '"image"\t"caption"\n"a"\t"whole ""field"",\tone\nmore"\n', ['whole "field",\tone\nmore']),
        ("tsv", 'image\tcaption\r\na\t"one\r\nb\ttwo"\r\nc\t"three', ['"one', 'two"', '"three']),
        ("csv", "\n  \nimage\tcaption\na\tone, two\n \n", ["one, two"]),
        ("csv", 'caption,image\n"see b.png, here\nand c.png",a.png\n', ["see b.png, here\nand c.png"]),
        ("csv", "image;caption\na.png;a dog, a cat\n", ["a dog, a cat"]),
        ("csv", '"image"; "caption"\na.png; "a dog, a cat"\n', ["a dog, a cat"]),
        ("csv", 'image;"caption"\na.png;"a dog, a cat"\n', ["a dog, a cat"]),
        ("csv", "image,caption,,\na.png,one,,\n", ["one"]),  # as a spreadsheet leaves empty columns
    ],
)
def test_quotes_and_delimiters(tmp_path, form, text, captions):
    assert all_captions(open_source(text_table(tmp_path, text, form))) == [[text] for text in captions]


def test_a_delimiter_in_a_quoted_column_name_is_none(tmp_path):
    path = text_table(tmp_path, '"image, file";"caption"\na.png;"a dog, a cat"\n')
    assert open_source(path, image_column="image, file").captions(0) == ["a dog, a cat"]


@pytest.mark.parametrize(
    ("form", "text", "bad"),
    [
        (
            "csv",
            ["image,caption", "a.png,one", "b.png", ",three", "d.png,four,more", "e.png,five"],
            {3: "broken row", 4: "missing twin", 5: "broken row"},
        ),
        (
            "jsonl",
            [
                '{"image": "a.png"}',
                "{no",
                "[1]",
                '{"text": "x"}',
                "[" * 10**5,
                '{"image": "e.png", "text": "b"}',
            ],
            {2: "broken row", 3: "broken row", 4: "missing twin", 5: "broken row"},
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, form, text, bad):
    source = open_source(text_table(tmp_path, "\n".join(text), form))
    assert names(source) == ["a.png", "e.png"]
    assert skipped(source) == [(f"a.{form}:{line}", cause) for line, cause in bad.items()]


@pytest.mark.parametrize("more", [0, 9000])  # csv takes at most 128 KiB for a field
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_quote_that_does_not_close_costs_its_line(tmp_path, end, more):
    rows = 'image,caption|a.png,1|b.png,"2|c.png,"3"|d.png,"4|e.png,5"|f.png,"6" said|"g.png,7|h.png,8'
    rows = [*rows.split("|"), *(f"{i}.png,one" for i in range(more)), 'z.png,"9']
    (tmp_path / "a.csv").write_text(end.join(rows), newline="")
    source = open_source(tmp_path / "a.csv")
    assert names(source)[:4] == ["a.png", "c.png", "e.png", "h.png"]
    assert skipped(source) == [(f"a.csv:{line}", "broken row") for line in (3, 5, 7, 8, 10 + more)]
    assert len(source) == more + 4


@pytest.mark.parametrize(
    "text",
    [
        'image,caption\n1,a\n2,"b\n3,c\n4,d"\n5,e\n',  # no suffix: as the image of its own row
        'caption,image\na,1.png\n"b,2.png\nc,"3.png"\nd,4.png\ne,5.png\n',
        'caption,image\na,1.png\n"b,2.png\nc",3.png\nd,4.png\ne,5.png\n',
        'image,caption\n1.png,a\n"2.png,b\n3.png",c\n4.png,d\n5.png,e\n',
    ],
)
def test_a_later_quote_merges_no_rows(tmp_path, text):
    source = open_source(text_table(tmp_path, text))
    assert [name[0] for name in names(source)] == ["1", "3", "4", "5"]
    assert skipped(source) == [("a.csv:3", "broken row")]


@pytest.mark.parametrize("form", TABLES)
def test_missing_and_invisible_captions_are_none(tmp_path, form):
    texts = ["nan", "None", " NULL ", "\u200b", "\ufeff \xad", "nan bread"]
    texts += ["x" * 2**18] * (form != "csv")  # csv stops at such a field itself
    path = table(tmp_path, [{"image": "a.png", "caption": text} for text in texts], form)
    assert all_captions(open_source(path)) == [[]] * 5 + [["nan bread"]] + [[]] * (form != "csv")


def test_other_encodings_are_named(tmp_path):
    write_files(tmp_path, {"a.png": image(1)})
    (tmp_path / "a.csv").write_bytes(b"image,caption\na.png,sch\xf6n\n")
    with pytest.raises(BadSampleError, match=r"a\.png: caption not UTF-8"):
        open_source(tmp_path / "a.csv").read(0)
    for form in ("csv", "jsonl"):
        path = tmp_path / f"b.{form}"
        path.write_bytes("image,caption\na.png,hello\n".encode("utf-16"))
        with pytest.raises(ValueError, match=r"b\..* is UTF-16, expected UTF-8"):
            open_source(path)

"""Tables of public caption datasets, from small files in exactly the published formats."""

import gzip
import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from dalle.commands import convert_captions as command
from dalle.commands.convert_captions import ConvertCaptionsArgs, convert_captions
from dalle.config import parse
from dalle.data.caption_datasets import Format

DATA_PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def table(path: Path) -> dict[str, list[str]]:
    """The rows, in their order; no image twice."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(sorted(row) == ["captions", "image"] for row in rows)
    assert len({row["image"] for row in rows}) == len(rows)
    return {row["image"]: row["captions"] for row in rows}


def convert(tmp_path: Path, format: str, files: dict[str, str], names: list[str], **changes):
    """Writes published files and images, and converts them; the counts, and the rows."""
    images(tmp_path / "images", *names)
    for name, text in files.items():
        (tmp_path / "captions" / name).parent.mkdir(parents=True, exist_ok=True)
        content = text.encode("utf-8", "surrogateescape")
        content = gzip.compress(content) if name.endswith(".gz") else content
        (tmp_path / "captions" / name).write_bytes(content)
    run = ConvertCaptionsArgs(format, tmp_path / "captions", tmp_path / "images", tmp_path / "table.jsonl")
    run = replace(run, **changes)
    return convert_captions(run), table(run.out)


COCO = {
    "info": {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "year": 2017},
    "licenses": [{"url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "id": 1}],
    "images": [
        {"license": 1, "file_name": f"000000{id}.jpg", "height": 480, "width": 640, "id": id}
        for id in (203564, 179765, 322141)
    ],
    "annotations": [
        {"image_id": 179765, "id": 38, "caption": "A black motorcycle à la café"},
        {"image_id": 203564, "id": 37, "caption": "A clock with a wheel.\n"},
        {"image_id": 322141, "id": 49, "caption": "A room with sinks"},
        {"image_id": 203564, "id": 181, "caption": "A bicycle as a clock"},
        {"image_id": 203564, "id": 182, "caption": "A clock with a wheel."},
        {"image_id": 99, "id": 183, "caption": "Of nothing"},
        {"image_id": 179765, "id": 184, "caption": " "},
    ],
}


def test_coco(tmp_path):
    names = ["train2017/000000179765.jpg", "train2017/000000203564.jpg", "val2017/1.jpg"]
    done, rows = convert(tmp_path, "coco", {"captions_train2017.json": json.dumps(COCO)}, names)
    clock = ["A clock with a wheel.", "A bicycle as a clock"]
    assert rows == {f"images/{names[0]}": ["A black motorcycle à la café"], f"images/{names[1]}": clock}
    assert (done.images, done.captions, done.without_caption) == (2, 3, 1)
    assert done.left_out == {"no such image": 1, "not readable": 1, "no caption": 1}
    assert done.examples["no such image"] == "000000322141.jpg"


def test_karpathy(tmp_path):
    sentences = [{"tokens": [text], "raw": text, "imgid": 0} for text in ("A man with a helmet.", "A bike.")]
    name = "COCO_val2014_000000391895.jpg"
    image = {"filepath": "val2014", "filename": name, "imgid": 0, "split": "test", "sentences": sentences}
    files = {"dataset_coco.json": json.dumps({"images": [image], "dataset": "coco"})}
    _, rows = convert(tmp_path, "karpathy", files, [f"val2014/{name}"])
    assert list(rows.values()) == [["A man with a helmet.", "A bike."]]


CC = """\
a very typical bus station\thttp://lh6.example.com/IMG.jpg
sierra looked "stunning" in this top\thttp://78.example.com/tumblr.jpg?a=1
" young confused girl standing\thttp://media.example.com/x.png
a line that lacks its address
"""


@pytest.mark.parametrize("header", ["", "caption\turl\n"])
def test_conceptual_captions_by_number_without_quoting(tmp_path, header):
    names = ["00000/000000001.jpg", "00000/000000002.webp", "00000/000000004.jpg"]
    done, rows = convert(tmp_path, "cc", {"Train_GCC-training.tsv": header + CC}, names)
    texts = ['sierra looked "stunning" in this top', '" young confused girl standing']
    assert rows == {f"images/{name}": [text] for name, text in zip(names, texts, strict=False)}
    assert (done.left_out, done.without_caption) == ({"no such image": 1, "not readable": 1}, 1)


@pytest.mark.parametrize("naming", ["number", "md5", "sha256"])
def test_conceptual_12m_by_hash_of_the_url(tmp_path, naming):
    url, name = "http://lh6.example.com/IMG.jpg", "0"
    if naming != "number":
        name = hashlib.new(naming, url.encode()).hexdigest()
    text = f"url\tcaption\n{url}\ta bus\nhttp://78.example.com\ta dress"
    _, rows = convert(tmp_path, "cc12m", {"cc12m.tsv.gz": text}, [f"{name}.jpg"], naming=naming)
    assert rows == {f"images/{name}.jpg": ["a bus"]}


def test_redcaps_keeps_subreddits_apart(tmp_path):
    files = {}
    for subreddit, captions in {"birds": ["a wren", "an owl"], "cats": ["mlem"]}.items():
        posts = [
            {"image_id": str(i), "subreddit": subreddit, "author": "a", "raw_caption": "A", "caption": text}
            for i, text in enumerate(captions, 1)
        ]
        files[f"{subreddit}_2017.json"] = json.dumps({"info": {"version": "1.0"}, "annotations": posts})
    done, rows = convert(tmp_path, "redcaps", files, ["birds/1.jpg", "cats/1.jpg", "cats/2.jpg"])
    assert rows == {"images/birds/1.jpg": ["a wren"], "images/cats/1.jpg": ["mlem"]}
    assert done.examples["no such image"] == "birds/2"  # never the owl with a cat's image


def test_localized_narratives_with_and_without_leading_zeros(tmp_path):
    def line(dataset, image, caption):
        item = {"dataset_id": dataset, "image_id": image, "annotator_id": 93, "caption": caption}
        return json.dumps(item | {"timed_caption": [{"utterance": "In this"}], "traces": [[{"x": 0.2}]]})

    coco, cows = "coco_val_localized_narratives.jsonl", line("mscoco_val2017", "137576", "cows")
    trees = [line("open_images_train", "000a1249af2bc5f0", text) for text in ("a tree", "a tall tree")]
    files = {coco: f"{cows}\n{{broken", "open_images_train_v6-00000-of-00010.jsonl": "\n".join(trees)}
    names = ["000a1249af2bc5f0.jpg", "val2017/000000137576.jpg"]
    done, rows = convert(tmp_path, "narratives", files, names)
    assert rows == {f"images/{names[0]}": ["a tree", "a tall tree"], f"images/{names[1]}": ["cows"]}
    assert done.examples == {"not readable": f"{coco}, line 2: not a JSON object"}


SVG = """\
<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/"
     xmlns:cc="http://web.resource.org/cc/"
     xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" width="9" height="9">
  <!-- a comment -->
  <metadata><rdf:RDF><cc:Work rdf:about="">
    <dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
    <dc:title>{title}</dc:title>
    <dc:subject><rdf:Bag><rdf:li>clip art</rdf:li><rdf:li>food</rdf:li>
      <rdf:li>Soft  Drink</rdf:li></rdf:Bag></dc:subject>
    <cc:license rdf:resource="http://creativecommons.org/licenses/publicdomain/"/>
  </cc:Work></rdf:RDF></metadata>
</svg>
"""


def test_open_clip_art_takes_title_and_new_keywords(tmp_path):
    titles = {"food/cup.svg": "soft drink in a cup", "tools/cup.svg": "tool", "gz/dish.SVG.gz": "dish"}
    files = {name: SVG.format(title=title) for name, title in titles.items()}
    files |= {"plain.svg": '<svg xmlns="http://www.w3.org/2000/svg"/>', "broken.svg": "<svg><path>"}
    names = ["food/cup.png", "gz/dish.png", "plain.png", "broken.png"]
    done, rows = convert(tmp_path, "openclipart", files | {"cut.svg.GZ": "\x1f"}, names)
    assert rows["images/food/cup.png"] == ["soft drink in a cup, food"]
    assert rows["images/gz/dish.png"] == ["dish, food, Soft Drink"]
    assert done.left_out == {"no such image": 1, "no caption": 1, "not readable": 2}


@pytest.mark.parametrize(
    ("names", "text", "expected", "left_out"),
    [
        (["1.jpg"], "1.jpg#0\tTwo guys .\n1.jpg#1\tfriends", {"1": ["Two guys .", "friends"]}, ""),
        (["1.jpg"], "1.jpg#0\tTwo guys .\nno number\tthere", {"1": ["Two guys ."]}, "not readable"),
        (["a/7.jpg", "b/7.jpg", "8.jpg"], "7.jpg#0\ts\n8.jpg#0\te", {"8": ["e"]}, "several images"),
        (["7.jpg", "007.jpg"], "007.jpg#0\ta\n7.jpg#0\tb", {"007": ["a"], "7": ["b"]}, ""),
        (["1.jpg", "2.jpg"], "1.jpg#0\tcaf\udce9\n2.jpg#0\t猫 قط", {"2": ["猫 قط"]}, "not UTF-8"),
    ],
    ids=["two captions", "no number", "ambiguous", "the exact name before the number", "not UTF-8"],
)
def test_flickr(tmp_path, names, text, expected, left_out):
    done, rows = convert(tmp_path, "flickr", {"results_20130124.token": text}, names)
    assert rows == {f"images/{name}.jpg": captions for name, captions in expected.items()}
    assert sum(done.left_out.values()) == bool(left_out)
    assert all(left_out in cause for cause in done.left_out)


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are any bytes")
def test_file_names_that_are_not_utf8_are_counted(tmp_path):
    images(tmp_path / "images", "1.jpg")
    os.rename(tmp_path / "images" / "1.jpg", os.fsencode(tmp_path / "images") + b"/caf\xe9.jpg")
    done, _ = convert(tmp_path, "flickr", {"x.token": "2.jpg#0\tx"}, ["2.jpg"])
    assert done.left_out == {"a file name that is not UTF-8": 1}


def test_paths_start_at_the_table_or_at_the_images(tmp_path, capsys):
    paths = {"images/t.jsonl": "a/1.jpg", "t.jsonl": "images/a/1.jpg", "else/t.jsonl": "a/1.jpg"}
    for out, path in paths.items():
        _, rows = convert(tmp_path, "flickr", {"x.token": "1.jpg#0\tone"}, ["a/1.jpg"], out=tmp_path / out)
        assert list(rows) == [path]
        assert ("--data.image-root" in capsys.readouterr().out) == (out == "else/t.jsonl")


def test_the_table_is_the_same_again_and_a_failed_run_leaves_it_alone(tmp_path, monkeypatch):
    names = [f"{i}.jpg" for i in range(20)]
    lines = [f"{i}.jpg#{k}\tcaption {k} of {i}" for k in range(3) for i in (*range(10, 20), *range(10))]
    tables = []
    for ordered in (lines, sorted(lines)):
        _, rows = convert(tmp_path, "flickr", {"x.token": "\n".join(ordered)}, names)
        assert list(rows) == sorted(f"images/{name}" for name in names)
        tables.append((tmp_path / "table.jsonl").read_bytes())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="finds an image"):
        convert(tmp_path, "flickr", {"x.token": "20.jpg#0\ttwo"}, [])
    assert sorted(tmp_path.iterdir()) == before
    assert tables == [(tmp_path / "table.jsonl").read_bytes()] * 2
    left_by_a_killed_one = tmp_path / ".partial-table" / "pairs.sqlite"
    left_by_a_killed_one.parent.mkdir()
    left_by_a_killed_one.write_text("half of it")
    full = "pragma max_page_count=1;" + command.SCHEMA
    monkeypatch.setattr(command, "SCHEMA", full)
    with pytest.raises(ValueError, match=r"cannot write .*disk is full"):
        convert(tmp_path, "flickr", {"x.token": "\n".join(lines)}, names)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((json.dumps(COCO)[:length], "truncated") for length in (1, 40, 400, -3)),
        ("[]", "line 1: .*expected {"),
        ('{"info": {}}', "no list 'images'"),
        ('{"images": [oops]}', "not JSON"),
    ],
)
def test_other_json_is_refused(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        convert(tmp_path, "coco", {"c.json": text}, ["1.jpg"])


NUMBER = '{"image_id": 1, "caption": %s}'


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 99999, '"a", "caption": "b"'])
def test_hostile_lines_are_counted(tmp_path, value):
    lines = [NUMBER % one for one in (value, "0", '"c"')]
    done, rows = convert(tmp_path, "narratives", {"c.jsonl": "\n".join(lines)}, ["1.jpg"])
    assert (rows, done.left_out) == ({"images/1.jpg": ["c"]}, {"not readable": 1, "no caption": 1})


@pytest.mark.parametrize("value", ['"nan"', '"\\u200b"', "NaN", "1e400", "null", "[]", '{"a": "b"}', "true"])
def test_values_that_are_no_captions(tmp_path, value):
    records = ",".join(NUMBER % caption for caption in (value, '"c"'))
    coco = '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [' + records + "]}"
    done, rows = convert(tmp_path, "coco", {"c.json": coco}, ["1.jpg"])
    assert (rows, done.left_out) == ({"images/1.jpg": ["c"]}, {"no caption": 1})
    sentences = '[3, null, {"raw": "c"}, {"raw": ' + value + "}]"
    karpathy = '{"images": [{"filename": "1.jpg", "sentences": ' + sentences + "}]}"
    _, rows = convert(tmp_path, "karpathy", {"c.json": karpathy}, [], out=tmp_path / "k.jsonl")
    assert rows == {"images/1.jpg": ["c"]}


def test_a_truncated_gzip_is_refused(tmp_path):
    file = tmp_path / "cc.tsv.gz"
    file.write_bytes(gzip.compress(b"caption\thttp://a\n" * 100)[:-9])
    with pytest.raises(ValueError, match="cannot read"):
        convert(tmp_path, "cc", {}, ["0.jpg"], captions=file)


def test_missing_arguments_and_files_are_refused(tmp_path):
    files = {"format": "cc", "files": {"a.tsv": "", "b.tsv": ""}, "names": ["0.jpg"]}
    for changes, words in (
        *(({name: None}, f"--{name} is missing") for name in ("format", "captions", "images")),
        ({"images": tmp_path / "none"}, "no folder .*fetched"),
        ({"captions": tmp_path / "none"}, "no file or folder"),
        ({"captions": tmp_path / "images"}, r"with \.tsv"),
        ({"out": tmp_path / "table.csv"}, r"\.jsonl"),
        ({}, "2 files, each counts from 0"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(tmp_path, **files | changes)


def test_the_command(tmp_path, script):
    images(tmp_path / "images", "1.jpg")
    (tmp_path / "x.token").write_text("1.jpg#0\tone")
    words = ["--format", "flickr", "--captions", "x.token"]
    assert "1 images with 1 captions" in script("convert_captions", *words, "--images", "images").out
    assert table(tmp_path / "table.jsonl") == {"images/1.jpg": ["one"]}


def test_the_data_page_has_a_command_for_each_format():
    lines = DATA_PAGE.read_text(encoding="utf-8").splitlines()
    commands = [line.split()[2:] for line in lines if line.startswith("python scripts/convert_captions.py")]
    runs = [parse(ConvertCaptionsArgs, words) for words in commands]
    assert {run.format for run in runs} == set(get_args(Format))
    assert all(run.captions and run.images for run in runs)

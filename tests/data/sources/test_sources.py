"""Captioned images in every form on disk (dalle/data/sources): the same records, whatever the form."""

import gc
import io
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle.data.bad_samples import BadSampleError
from dalle.data.config import DataConfig
from dalle.data.dataset import open_dataset
from dalle.data.sources import detect_source, has_val_split, open_source
from dalle.data.sources.detect import expand_braces
from dalle.data.sources.index import StringTable
from tests.helpers.formats import (
    COUNT,
    FORMS,
    IDS,
    caption,
    csv_file,
    folder,
    image,
    jsonl_file,
    one_tar,
    pair,
    parquet_bytes,
    tars,
    write_tar,
)


def level(data: bytes) -> int:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[0, 0, 0]


@pytest.mark.parametrize(("form", "columns"), FORMS, ids=IDS)
def test_every_form_gives_the_same_images_and_captions(tmp_path, form, columns):
    source = open_source(form(tmp_path), caption_column=columns)
    assert len(source) == COUNT
    assert list(source.skipped) == []
    for i in (3, 0, 11, 7):
        record = source.read(i)
        assert record.captions == source.captions(i) == caption(i)
        assert abs(int(level(record.image)) - i) <= 1  # WebP is lossy
        assert record.name == source.name(i)
    assert len({source.name(i) for i in range(COUNT)}) == COUNT
    assert source.shares().dtype == np.uint32


@pytest.mark.parametrize(("form", "columns"), FORMS, ids=IDS)
def test_every_form_keeps_its_hash_and_travels_to_another_process(tmp_path, form, columns):
    place = form(tmp_path)
    source, again = (open_source(place, caption_column=columns) for _ in range(2))
    assert source.hash == again.hash
    source.read(1)
    other = pickle.loads(pickle.dumps(source))
    assert [other.read(i) for i in range(COUNT)] == [source.read(i) for i in range(COUNT)]


@pytest.mark.parametrize(("form", "columns"), FORMS, ids=IDS)
def test_every_form_is_split_by_name(tmp_path, form, columns):
    config = DataConfig(str(form(tmp_path)), resolution=16, val_fraction=0.4, caption_column=columns)
    train, held_out = open_dataset(config), open_dataset(config, "held_out")
    names = [{pairs.name(i) for i in range(pairs.size)} for pairs in (train, held_out)]
    assert train.size + held_out.size == COUNT
    assert not names[0] & names[1]
    assert train.hash != held_out.hash
    assert train.load([(0, 0)], "dvae", seed=1).pixels.shape == (1, 3, 16, 16)


# What lies at a path.


def test_braces_are_counted_with_their_zeros():
    assert list(expand_braces("a-{08..10}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert list(expand_braces("{a,b}/{0..1}")) == ["a/0", "a/1", "b/0", "b/1"]


@pytest.mark.parametrize(
    "pattern", ["set-{000..002}.tar", "set-*.tar", "set-00[0-2].tar", "*-{000,001,002}.tar"]
)
def test_patterns_name_tars(tmp_path, pattern):
    tars(tmp_path)
    assert len(open_source(f"{tmp_path}/{pattern}")) == COUNT
    assert open_source(f"{tmp_path}/{pattern}").hash == open_source(tmp_path).hash


def test_what_braces_promise_must_be_there(tmp_path):
    tars(tmp_path)
    with pytest.raises(ValueError, match=r"no file .*set-003\.tar, which .* names"):
        detect_source(f"{tmp_path}/set-{{000..003}}.tar")
    with pytest.raises(ValueError, match=r"no file matches .*other-\*\.tar"):
        detect_source(f"{tmp_path}/other-*.tar")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "nothing at .*nowhere; give a folder, a table or tars, or the word shapes"),
        ("image.png", r"is \.png; expected a folder of images"),
        ("set.tar.gz", r"is \.gz; expected a folder of images, \.tar files \(not compressed\) or a table"),
    ],
)
def test_other_things_are_refused(tmp_path, name, said):
    if "." in name:
        (tmp_path / name).write_bytes(b"something")
    with pytest.raises(ValueError, match=said):
        open_source(tmp_path / name)


def test_what_is_not_on_a_disk_is_refused():
    with pytest.raises(ValueError, match=r"s3://bucket/set\.tar is not on a disk; copy or mount it"):
        open_source("s3://bucket/set.tar")


def test_a_table_in_a_folder_of_images_with_captions_is_left_alone(tmp_path):
    folder(tmp_path)
    (tmp_path / "list.csv").write_text("image,caption\np000.png,other\n")
    assert detect_source(str(tmp_path)).format == "folder"
    assert detect_source(str(tmp_path), "table").files == (tmp_path / "list.csv",)
    assert open_source(tmp_path, "table").read(0).captions == ["other"]


def test_a_folder_of_images_with_one_table_is_that_table(tmp_path):
    csv_file(tmp_path)
    assert detect_source(str(tmp_path)).format == "table"


def test_tables_of_two_kinds_are_refused(tmp_path):
    csv_file(tmp_path)
    (tmp_path / "more.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"holds several formats \(\.csv, \.jsonl\); give one of them"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["val.tar", "val-000.tar", "Validation_0.tar", "dev.tar", "held-out.tar"])
def test_a_part_for_evaluation_is_kept_for_it(tmp_path, name):
    tars(tmp_path)
    write_tar(tmp_path / name, pair("a", 1) + pair("b", 2))
    write_tar(tmp_path / "test-000.tar", pair("c", 3))
    config = DataConfig(str(tmp_path), resolution=16)
    assert has_val_split(str(tmp_path))
    assert (open_dataset(config).size, open_dataset(config, "held_out").size) == (COUNT, 2)
    assert len(open_source(tmp_path)) == COUNT + 2  # the test part is left alone


@pytest.mark.parametrize("name", ["valley.tar", "device.tar", "interval-0.tar"])
def test_other_names_are_no_part_for_evaluation(tmp_path, name):
    write_tar(tmp_path / name, pair("a", 1))
    write_tar(tmp_path / "set.tar", pair("b", 1))
    assert not has_val_split(str(tmp_path))


def test_pairs_to_evaluate_on_may_lie_elsewhere(tmp_path):
    for name in ("train", "other"):
        (tmp_path / name).mkdir()
    one_tar(tmp_path / "train")
    images_elsewhere = csv_file(tmp_path / "other")
    config = DataConfig(str(tmp_path / "train"), resolution=16, val_path=str(images_elsewhere))
    train, held_out = open_dataset(config), open_dataset(config, "held_out")
    assert (train.size, held_out.size) == (COUNT, COUNT)
    assert held_out.name(0) == "images/p000.png"


def test_splits_of_a_hub_set_are_its_parts(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": image(i), "path": None} for i in range(4)], "text": ["a"] * 4}
    whole = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": whole, "validation": whole.select([0])}).save_to_disk(
        str(tmp_path / "set")
    )
    config = DataConfig(str(tmp_path / "set"), resolution=16)
    assert (open_dataset(config).size, open_dataset(config, "held_out").size) == (4, 1)


# Tables.


@pytest.mark.parametrize(("form", "columns"), [(csv_file, None), (jsonl_file, None), (parquet_bytes, None)])
def test_a_missing_column_is_named_with_those_there(tmp_path, form, columns):
    with pytest.raises(ValueError, match=r"has no column 'photo', only .*; name it by --data\.image-column"):
        open_source(form(tmp_path), image_column="photo")
    with pytest.raises(
        ValueError, match=r"has no column 'words', only .*; name it by --data\.caption-column"
    ):
        open_source(tmp_path / next(tmp_path.glob("pairs.*")).name, caption_column="words")


def test_columns_without_a_usual_name_are_asked_for(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(
        ValueError, match="has no column with a usual name for images, only 'x', 'y'; name it by --data"
    ):
        open_source(tmp_path / "a.csv")


def test_quotes_commas_and_line_breaks_in_csv(tmp_path):
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "a.csv").write_text('caption,image\n"a ""red"" dog,\non grass",a.png\n5" pipe,a.png\n')
    source = open_source(tmp_path / "a.csv")
    assert [source.captions(i) for i in range(2)] == [['a "red" dog,\non grass'], ['5" pipe']]


def test_quotes_mean_nothing_in_tsv(tmp_path):
    (tmp_path / "a.tsv").write_text(
        'image\tcaption\na.png\t5" pipe\nb.png\t"so called" dog\nc.png\t"whole ""field"""\n'
    )
    source = open_source(tmp_path / "a.tsv")
    assert [source.captions(i) for i in range(3)] == [['5" pipe'], ['"so called" dog'], ['whole "field"']]


def test_semicolons_part_a_csv_without_commas(tmp_path):
    (tmp_path / "a.csv").write_text("image;caption\na.png;a dog, a cat\n")
    assert open_source(tmp_path / "a.csv").captions(0) == ["a dog, a cat"]


def test_rows_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\na.png,one\nb.png\n,three\nd.png,four,more\ne.png,five\n")
    source = open_source(tmp_path / "a.csv")
    assert [source.name(i) for i in range(len(source))] == ["a.png", "e.png"]
    assert [(skip.name, skip.cause) for skip in source.skipped] == [
        ("a.csv:3", "broken row"),
        ("a.csv:4", "missing twin"),
        ("a.csv:5", "broken row"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        '"image"; "caption"\na.png; "a dog, a cat"\n',
        'image;"caption"\na.png;"a dog, a cat"\n',
        '"image, file";"caption"\na.png;"a dog, a cat"\n',
    ],
)
def test_the_mark_between_columns_is_looked_for_outside_quotes(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    column = "image, file" if "file" in text else None
    assert open_source(tmp_path / "a.csv", image_column=column).captions(0) == ["a dog, a cat"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_utf_16_is_told_with_what_to_do(tmp_path, form):
    (tmp_path / f"a.{form}").write_bytes("image,caption\na.png,hello\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\..* is UTF-16, expected UTF-8; save it again"):
        open_source(tmp_path)


def test_json_nested_without_end_is_a_broken_row_and_no_more(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + '\n{"image": "a.png", "caption": "x"}\n')
    source = open_source(tmp_path / "a.jsonl")
    assert (len(source), [skip.cause for skip in source.skipped]) == (1, ["broken row"])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(image(1))
    (tmp_path / "set" / "a.json").write_text("[" * 100_000)
    with pytest.raises(BadSampleError, match="broken row"):
        open_source(tmp_path / "set").read(0)


def test_several_keys_of_json_may_be_named_with_spaces(tmp_path):
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "a.json").write_text('{"alt": "one", "title": "two"}')
    assert open_source(tmp_path, caption_column="alt, title").captions(0) == ["one", "two"]


def test_links_in_a_circle_are_no_files(tmp_path):
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("words")
    (tmp_path / "again").symlink_to(tmp_path)
    source = open_source(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["a.png"]
    (tmp_path / "table.csv").write_text("image,caption\nb.png,words\n")
    with pytest.raises(BadSampleError, match=r"b\.png: missing twin"):
        open_source(tmp_path / "table.csv").read(0)


def test_lines_of_json_that_cannot_be_read_are_named(tmp_path):
    lines = [
        '{"image": "a.png", "text": "one"}',
        "{broken",
        "[1]",
        '{"text": "two"}',
        '{"image": "b.png", "text": "b"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = open_source(tmp_path / "a.jsonl")
    assert [source.name(i) for i in range(len(source))] == ["a.png", "b.png"]
    assert [(skip.name, skip.cause) for skip in source.skipped] == [
        ("a.jsonl:2", "broken row"),
        ("a.jsonl:3", "broken row"),
        ("a.jsonl:4", "missing twin"),
    ]


def test_captions_in_a_table_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "a.csv").write_bytes(b"image,caption\na.png,sch\xf6n\n")
    with pytest.raises(BadSampleError, match=r"a\.png: caption not UTF-8"):
        open_source(tmp_path / "a.csv").read(0)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "images/../../secret.png", "link.png"])
def test_paths_in_a_table_never_leave_its_folder(tmp_path, path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(image(1))
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "set" / "a.csv").write_text(f"image,caption\n{path},a secret\n")
    with pytest.raises(BadSampleError, match="leaves the folder"):
        open_source(tmp_path / "set" / "a.csv").read(0)


def test_the_images_of_a_table_may_lie_elsewhere(tmp_path):
    csv_file(tmp_path)
    (tmp_path / "lists").mkdir()
    os.rename(tmp_path / "pairs.csv", tmp_path / "lists" / "pairs.csv")
    with pytest.raises(BadSampleError, match=r"images/p000\.png: missing twin"):
        open_source(tmp_path / "lists" / "pairs.csv").read(0)
    assert level(open_source(tmp_path / "lists" / "pairs.csv", image_root=tmp_path).read(5).image) == 5


def test_rows_of_the_same_image_fall_into_the_same_part(tmp_path):
    rows = [f"p{i % 10}.png,caption {i}" for i in range(50)]
    (tmp_path / "a.csv").write_text("image,caption\n" + "\n".join(rows))
    config = DataConfig(str(tmp_path / "a.csv"), val_fraction=0.5)
    splits = open_dataset(config), open_dataset(config, "held_out")
    parts = [{pairs.name(i) for i in range(pairs.size)} for pairs in splits]
    assert not parts[0] & parts[1]
    assert sum(pairs.size for pairs in splits) == 50


def test_an_unreadable_parquet_is_named_and_the_others_are_read(tmp_path):
    parquet_bytes(tmp_path)
    (tmp_path / "zz.parquet").write_bytes(b"PAR1 nothing")
    source = open_source(tmp_path)
    assert len(source) == COUNT
    assert [(skip.name, skip.cause) for skip in source.skipped] == [("zz.parquet", "unreadable shard")]


# Folders.


def test_links_out_of_a_folder_are_refused(tmp_path):
    (tmp_path / "set" / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    folder(tmp_path / "outside")
    (tmp_path / "set" / "a.png").write_bytes(image(1))
    (tmp_path / "set" / "a.txt").write_text("mine")
    (tmp_path / "set" / "b.png").symlink_to(tmp_path / "outside" / "p001.png")
    (tmp_path / "set" / "b.txt").write_text("not mine")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "outside", target_is_directory=True)
    source = open_source(tmp_path / "set")
    assert [source.name(i) for i in range(len(source))] == ["a.png"]
    assert [(skip.name, skip.cause) for skip in source.skipped] == [
        ("b.png", "leaves the folder"),
        ("more", "leaves the folder"),
    ]


def test_a_caption_that_is_a_link_out_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "set" / "a.png").write_bytes(image(1))
    (tmp_path / "set" / "a.txt").write_text("mine")
    source = open_source(tmp_path / "set")
    (tmp_path / "set" / "a.txt").unlink()
    (tmp_path / "set" / "a.txt").symlink_to(tmp_path / "secret.txt")  # after the folder was opened
    with pytest.raises(BadSampleError, match="leaves the folder"):
        source.read(0)


def test_a_folder_that_is_itself_a_link_and_links_within_are_followed(tmp_path):
    (tmp_path / "set").mkdir()
    folder(tmp_path / "set")
    (tmp_path / "set" / "zz.png").symlink_to("p001.png")
    (tmp_path / "set" / "zz.txt").write_text("again")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    source = open_source(tmp_path / "link")
    assert (len(source), source.read(COUNT).captions) == (COUNT + 1, ["again"])


def test_twins_may_be_in_capitals(tmp_path):
    """As cameras and old systems write names."""
    for name, suffix, text in (("A", "TXT", "one\ntwo"), ("B", "JSON", '{"caption": "three"}')):
        (tmp_path / f"{name}.JPG").write_bytes(image(1))
        (tmp_path / f"{name}.{suffix}").write_text(text)
    (tmp_path / "list.csv").write_text("image,caption\nA.JPG,other\n")  # and so they are images with captions
    source = open_source(tmp_path)
    assert source.skipped == []
    assert [source.read(i).captions for i in range(2)] == [["one", "two"], ["three"]]


def test_the_small_letters_go_before_capitals_and_text_before_json(tmp_path):
    (tmp_path / "a.png").write_bytes(image(1))
    for suffix, text in (("JSON", '"four"'), ("json", '"three"'), ("TXT", "two"), ("txt", "one")):
        (tmp_path / f"a.{suffix}").write_text(text)
        source = open_source(tmp_path)
        assert source.captions(0) == [text.strip('"')]


# Tars.


def test_a_damaged_header_costs_one_member(tmp_path):
    file = one_tar(tmp_path)
    with tarfile.open(file) as tar:
        at = tar.getmember("000005.png").offset
    data = bytearray(file.read_bytes())
    data[at + 120 : at + 130] = b"\xff" * 10
    file.write_bytes(data)
    source = open_source(file)
    assert [source.captions(i) for i in range(len(source))] == [caption(i) for i in range(COUNT) if i != 5]
    assert [(skip.name, skip.cause) for skip in source.skipped] == [
        ("all.tar/000005.png", "broken tar member")
    ]


def test_a_stretch_of_rubbish_costs_what_lay_there(tmp_path):
    file = one_tar(tmp_path)
    with tarfile.open(file) as tar:
        first, last = (tar.getmember(name).offset for name in ("000004.png", "000006.txt"))
    data = file.read_bytes()
    for rubbish in (bytes(last - first), b"\xff" * (last - first)):
        file.write_bytes(data[:first] + rubbish + data[last:])
        source = open_source(file)
        assert [source.captions(i) for i in range(len(source))] == [
            caption(i) for i in range(COUNT) if not 4 <= i <= 6
        ]
        assert {skip.name: skip.cause for skip in source.skipped}["all.tar/000006"] == "missing twin"


def test_a_header_whose_size_is_no_number_is_damaged(tmp_path):
    file = one_tar(tmp_path)
    with tarfile.open(file) as tar:
        at = tar.getmember("000005.png").offset
    data = bytearray(file.read_bytes())
    data[at + 124 : at + 136] = b"99999999999\0"
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])  # and yet the checksum is right
    file.write_bytes(data)
    assert len(open_source(file)) == COUNT - 1


def test_a_tar_that_breaks_off_keeps_what_is_whole(tmp_path):
    file = one_tar(tmp_path)
    with tarfile.open(file) as tar:
        at = tar.getmember("000007.png").offset_data
    file.write_bytes(file.read_bytes()[: at + 10])
    source = open_source(file)
    assert len(source) == 7
    assert [(skip.name, skip.cause, skip.detail) for skip in source.skipped] == [
        ("all.tar/000007.png", "broken tar member", "the tar breaks off within it")
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_each_format_of_tar(tmp_path, form):
    key = "some-folder/" * 12 + "größe"  # beyond the 100 bytes of the first format
    file = write_tar(tmp_path / "a.tar", pair(key, 3), format=form)
    source = open_source(file)
    assert source.name(0) == f"a.tar/{key}"
    assert level(source.read(0).image) == 3


def test_tars_put_one_after_another_are_read_to_the_end(tmp_path):
    parts = [write_tar(tmp_path / f"{i}.bin", pair(f"{i}", i)).read_bytes() for i in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    assert len(open_source(tmp_path / "all.tar")) == 3


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "a/../../escape"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    file = write_tar(tmp_path / "a.tar", pair(name, 1) + pair("good", 2))
    source = open_source(file)
    assert [source.name(i) for i in range(len(source))] == ["a.tar/good"]
    assert [skip.cause for skip in source.skipped] == ["leaves the folder"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_long_name_hides_no_way_out(tmp_path, form, where):
    """Beyond 100 bytes the name stands in another field, or in a member of its own."""
    folders = ["some-folder"] * 11
    folders[{"first": 0, "middle": 5, "last": 10}[where]] = ".."
    file = write_tar(
        tmp_path / "a.tar", pair("/".join([*folders, "escape"]), 1) + pair("good", 2), format=form
    )
    source = open_source(file)
    assert [source.name(i) for i in range(len(source))] == ["a.tar/good"]
    assert {skip.cause for skip in source.skipped} == {"leaves the folder"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_a_tar_are_not_followed(tmp_path, kind):
    (tmp_path / "secret.png").write_bytes(image(9))
    link = ("b.png", b"", {"type": kind, "linkname": "../secret.png"})
    file = write_tar(tmp_path / "a.tar", [*pair("a", 1), link, ("b.txt", b"a secret")])
    source = open_source(file)
    assert [source.name(i) for i in range(len(source))] == ["a.tar/a"]
    assert [(skip.name, skip.cause) for skip in source.skipped] == [("a.tar/b.png", "broken tar member")]


def test_twins_that_are_missing_are_named(tmp_path):
    members = [
        *pair("a", 1),
        ("b.png", image(2)),
        ("c.txt", b"alone"),
        ("d.cls", b"7"),
        ("e.seg.png", image(3)),
    ]
    source = open_source(write_tar(tmp_path / "a.tar", members))
    assert len(source) == 1
    assert [(skip.name, skip.cause) for skip in source.skipped] == [
        ("a.tar/b", "missing twin"),
        ("a.tar/c", "missing twin"),
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"no tar" * 200, "not a tar"), (b"", "empty"), (b"\x1f\x8b" + b"0" * 2000, "compressed")],
)
def test_a_shard_that_is_no_tar_is_named_and_the_others_are_read(tmp_path, data, said):
    tars(tmp_path)
    (tmp_path / "zz.tar").write_bytes(data)
    source = open_source(tmp_path)
    assert len(source) == COUNT
    [skip] = source.skipped
    assert (skip.name, skip.cause) == ("zz.tar", "unreadable shard")
    assert said in skip.detail


def test_a_set_without_any_pair_says_why(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(
        ValueError, match=r"1 tars from .* hold no KEY\.jpg .* \(a\.tar: unreadable shard, not a tar\)"
    ):
        open_source(tmp_path / "a.tar")


def test_the_key_of_captions_in_json_is_chosen(tmp_path):
    members = [*pair("a", 1), ("a.json", b'{"caption": "usual", "alt": ["one", "two"]}')]
    file = write_tar(tmp_path / "a.tar", members)
    assert open_source(file).captions(0) == caption(1)  # .txt goes first
    assert open_source(file, caption_column="alt").captions(0) == ["one", "two"]


def test_a_tar_that_goes_away_is_named_sample_by_sample(tmp_path):
    source = open_source(tars(tmp_path))
    (tmp_path / "set-001.tar").unlink()
    assert source.read(0).captions == caption(0)
    with pytest.raises(BadSampleError, match=r"set-001\.tar/000004: unreadable shard"):
        source.read(4)
    source.read(9)
    os.truncate(tmp_path / "set-002.tar", 600)
    with pytest.raises(BadSampleError, match=r"set-002\.tar/000009: unreadable shard .*has become shorter"):
        source.read(9)


# Indexes.


@pytest.mark.parametrize("form", ["csv", "tar"])
def test_memory_holds_neither_names_nor_captions(tmp_path, form):
    if form == "csv":
        (tmp_path / "a.csv").write_text(
            "image,caption\n" + "".join(f"{i}.png,caption {i}\n" for i in range(5000))
        )
    else:
        write_tar(tmp_path / "a.tar", [(f"{i}.{kind}", b"x") for i in range(5000) for kind in ("png", "txt")])
    source = open_source(tmp_path)
    assert len(source) == 5000
    assert len(pickle.dumps(source)) < 2000


def kept(make) -> int:
    """Bytes of Python and numpy objects that `make` leaves behind; mapped files are none of them."""
    tracemalloc.start()
    made = make()
    gc.collect()
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return used if made is not None else 0


@pytest.mark.parametrize("form", ["csv", "jsonl", "tar"])
def test_a_pair_more_costs_a_few_bytes(tmp_path, form):
    """Its number in the split, 4 bytes: no name, no caption, no object."""

    def write(count):
        place = tmp_path / f"{count}.{form}"
        if form == "tar":
            return write_tar(
                place, [(f"{i:06}.{kind}", b"x") for i in range(count) for kind in ("png", "txt")]
            )
        row = "{0}.png,caption {0}" if form == "csv" else '{{"image": "{0}.png", "text": "caption {0}"}}'
        place.write_text(
            "\n".join([*["image,caption"] * (form == "csv"), *(row.format(i) for i in range(count))])
        )
        return place

    def cost(count):
        config = DataConfig(str(write(count)), resolution=16, index_dir=str(tmp_path / "index"))
        return kept(lambda: [open_dataset(config), open_dataset(config, "held_out")])

    cost(500)  # what is imported and cached on the way
    assert (cost(10_000) - cost(1000)) / 9000 < 12


def test_the_name_of_a_image_costs_its_letters_and_eight_bytes():
    assert kept(lambda: StringTable(f"cats/{i:06}.png" for i in range(20_000))) < 20_000 * (15 + 8) + 10_000


def indexes(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_an_index_is_built_once_and_again_when_the_files_change(tmp_path, monkeypatch):
    one_tar(tmp_path)
    first = open_source(tmp_path / "all.tar", index_dir=tmp_path / "index")
    [name] = indexes(tmp_path / "index")
    before = (tmp_path / "index" / name / "meta.json").stat().st_mtime_ns
    open_source(tmp_path / "all.tar", index_dir=tmp_path / "index")
    assert (tmp_path / "index" / name / "meta.json").stat().st_mtime_ns == before
    write_tar(tmp_path / "all.tar", pair("only", 1))
    assert len(open_source(tmp_path / "all.tar", index_dir=tmp_path / "index")) == 1
    assert len(indexes(tmp_path / "index")) == 2
    assert first.hash != open_source(tmp_path / "all.tar", index_dir=tmp_path / "index").hash


def test_the_hash_names_the_data_not_their_place_or_time(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        os.utime(one_tar(tmp_path / name), (1, 1 if name == "here" else 2))
    assert open_source(tmp_path / "here").hash == open_source(tmp_path / "there").hash


@pytest.mark.parametrize("name", ["samples.bin", "text.bin", "meta.json"])
def test_a_damaged_index_is_built_again(tmp_path, name):
    one_tar(tmp_path)
    open_source(tmp_path / "all.tar", index_dir=tmp_path / "index")
    [folder] = (tmp_path / "index").iterdir()
    (folder / name).write_bytes((folder / name).read_bytes()[:-7])
    source = open_source(tmp_path / "all.tar", index_dir=tmp_path / "index")
    assert [source.captions(i) for i in range(COUNT)] == [caption(i) for i in range(COUNT)]


def test_an_index_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def failing(*_):
        raise KeyboardInterrupt

    one_tar(tmp_path)
    monkeypatch.setattr("dalle.data.sources.webdataset.scan_tar", failing)
    with pytest.raises(KeyboardInterrupt):
        open_source(tmp_path / "all.tar", index_dir=tmp_path / "index")
    assert indexes(tmp_path / "index") == []


def test_an_index_lies_beside_the_data_or_in_the_users_cache(tmp_path, monkeypatch):
    one_tar(tmp_path)
    open_source(tmp_path / "all.tar")
    assert len(indexes(tmp_path / ".dalle-index")) == 1
    (tmp_path / "home").mkdir()
    (tmp_path / "set").mkdir()
    one_tar(tmp_path / "set")
    (tmp_path / "set" / ".dalle-index").write_text("in the way: nothing can be written there")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert len(open_source(tmp_path / "set" / "all.tar")) == COUNT
    assert len(indexes(tmp_path / "home" / ".cache" / "dalle")) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    one_tar(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ValueError, match=r"cannot write an index to .*file .*; give another --data.index-dir"
    ):
        open_source(tmp_path / "all.tar", index_dir=tmp_path / "file")


def test_many_tars_are_indexed_by_several_processes(tmp_path):
    for i in range(17):
        write_tar(tmp_path / f"{i:02}.tar", pair("a", i) + pair("b", i + 1))
    source = open_source(tmp_path)
    assert [source.name(i) for i in (0, 1, 33)] == ["00.tar/a", "00.tar/b", "16.tar/b"]
    assert level(source.read(33).image) == 17


@pytest.mark.parametrize("write", [folder, one_tar, tars])
def test_a_part_that_a_set_does_not_have_is_refused(tmp_path, write):
    place = write(tmp_path)
    with pytest.raises(ValueError, match="no validation split of its own"):
        open_source(place, part="held_out")
    with pytest.raises(ValueError, match="unknown part 'val'; expected one of all, train, held_out"):
        open_source(place, part="val")
    assert len(open_source(place, part="train")) == COUNT

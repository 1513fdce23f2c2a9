"""WebDataset tars, damaged and hostile ones included: dalle/data/sources/webdataset.py."""

import os
import pickle
import tarfile

import pytest

from dalle.data import open_source
from dalle.data.bad_samples import BadSampleError
from dalle.types import RawSample
from tests.helpers.formats import (
    COUNT,
    all_captions,
    caption,
    image,
    level,
    names,
    one_tar,
    pair,
    skipped,
    tars,
    write_files,
    write_tar,
)

TAR_FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def offset_of(file, name: str) -> int:
    with tarfile.open(file) as tar:
        return tar.getmember(name).offset


def overwrite(file, at: int, data: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[at : at + len(data)] = data
    file.write_bytes(content)


@pytest.mark.parametrize("number", [0, 5, COUNT - 1])
def test_a_damaged_header_costs_one_sample(tmp_path, number):
    file = one_tar(tmp_path)
    overwrite(file, offset_of(file, f"{number:06}.png") + 120, b"\xff" * 10)
    source = open_source(file)
    assert all_captions(source) == [caption(i) for i in range(COUNT) if i != number]
    assert skipped(source) == [(f"all.tar/{number:06}.png", "broken tar member")]


@pytest.mark.parametrize("rubbish", [b"\0", b"\xff"])
def test_rubbish_costs_what_it_replaces(tmp_path, rubbish):
    file = one_tar(tmp_path)
    first, last = offset_of(file, "000004.png"), offset_of(file, "000006.txt")
    overwrite(file, first, rubbish * (last - first))
    source = open_source(file)
    assert all_captions(source) == [caption(i) for i in range(COUNT) if not 4 <= i <= 6]
    assert ("all.tar/000006.txt", "missing twin") in skipped(source)


@pytest.mark.parametrize("size", [b"99999999999\0", b"\xff" * 12, b"77777777777\0"])
def test_a_header_with_a_bad_size_is_damaged(tmp_path, size):
    file = one_tar(tmp_path)
    at = offset_of(file, "000005.png")
    overwrite(file, at + 124, size)
    overwrite(file, at + 148, b" " * 8)
    overwrite(file, at + 148, b"%06o\0 " % sum(file.read_bytes()[at : at + 512]))  # the right checksum
    source = open_source(file)
    assert all_captions(source) == [caption(i) for i in range(COUNT) if i != 5]
    assert skipped(source) == [("all.tar/000005.png", "broken tar member")]


def test_a_truncated_tar_keeps_the_complete_samples(tmp_path):
    file = one_tar(tmp_path)
    file.write_bytes(file.read_bytes()[: offset_of(file, "000007.png") + 522])
    source = open_source(file)
    assert len(source) == 7
    assert skipped(source) == [("all.tar/000007.png", "broken tar member")]
    assert "breaks off" in source.skipped[0].detail


def test_a_tar_without_its_end_and_rubbish_behind_it_are_named(tmp_path):
    content = one_tar(tmp_path).read_bytes()
    for name, data in {"cut": content.rstrip(b"\0"), "more": content + b"more"}.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        source = open_source(tmp_path / f"{name}.tar")
        assert (len(source), [cause for _, cause in skipped(source)]) == (COUNT, ["broken tar member"])


@pytest.mark.parametrize("kind", [b"L", b"x", b"g", b"S"])
@pytest.mark.parametrize("size", [b"\xff" * 10 + b"\0\0", b"\x80" + b"\x7f" * 11, b"00000000001\0"])
def test_headers_before_a_member_are_bounded(tmp_path, kind, size):
    header = bytearray(tarfile.TarInfo("h").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[148:156], header[156:157] = size, b" " * 8, kind
    header[148:156] = b"%06o\0 " % sum(header)
    file = one_tar(tmp_path)
    file.write_bytes(bytes(header + b"x".ljust(512, b"\0")) * 200 + file.read_bytes())
    assert all_captions(open_source(file))[-COUNT + 1 :] == [caption(i) for i in range(1, COUNT)]


@pytest.mark.parametrize("form", TAR_FORMATS)
def test_long_names(tmp_path, form):
    key = "some-folder/" * 12 + "größe"  # beyond the 100 bytes of the first format
    source = open_source(write_tar(tmp_path / "a.tar", pair(key, 3), format=form))
    assert names(source) == [f"a.tar/{key}"]
    assert level(source.read(0).image) == 3


def test_concatenated_tars_are_read_to_the_end(tmp_path):
    parts = [write_tar(tmp_path / f"{i}.bin", pair(f"{i}", i)).read_bytes() for i in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    assert len(open_source(tmp_path / "all.tar")) == 3


LONG = ["some-folder"] * 11


@pytest.mark.parametrize("form", TAR_FORMATS)
@pytest.mark.parametrize(
    "name",
    [
        "../escape",
        "/etc/escape",
        "a/../../escape",
        "/".join(["..", *LONG]),  # beyond 100 bytes a name is in another field or a member of its own
        "/".join([*LONG[:5], "..", *LONG[5:]]),
        "/".join([*LONG, "..", "escape"]),
    ],
)
def test_names_out_of_the_folder_are_refused(tmp_path, name, form):
    source = open_source(write_tar(tmp_path / "a.tar", pair(name, 1) + pair("good", 2), format=form))
    assert names(source) == ["a.tar/good"]
    assert {cause for _, cause in skipped(source)} == {"leaves the folder"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_a_tar_are_not_followed(tmp_path, kind):
    (tmp_path / "secret.png").write_bytes(image(9))
    link = ("b.png", b"", {"type": kind, "linkname": "../secret.png"})
    source = open_source(write_tar(tmp_path / "a.tar", [*pair("a", 1), link, ("b.txt", b"a secret")]))
    assert names(source) == ["a.tar/a"]
    assert skipped(source) == [("a.tar/b.png", "broken tar member")]


def test_a_hard_link_is_the_member_that_it_names(tmp_path):
    link = ("b.png", b"", {"type": tarfile.LNKTYPE, "linkname": "a.png"})
    source = open_source(write_tar(tmp_path / "a.tar", [*pair("a", 1), link, ("b.txt", b"the same image")]))
    assert (names(source), source.skipped) == (["a.tar/a", "a.tar/b"], [])
    assert source.read(1) == RawSample("a.tar/b", image(1), ["the same image"])


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_samples_and_what_is_left_out_are_the_same_in_tars_and_folders(tmp_path, form):
    members = [*pair("a", 1), *pair("photo 2.3 (final)", 2), *pair("photo 2.4", 3), ("a.cls", b"7")]
    members += [("a.jfif", image(4, form="JPEG")), ("a.seg.png", image(5)), ("._a.png", b"hidden")]
    lone = dict.fromkeys(["photo 2.5.png", "c.txt", "e.seg.png", "f.json"], "missing twin")
    lone |= {"d.cls": "unused file", "f.heic": "unused file"}
    lone |= {"a.TXT": "unused file", "i.png": "missing twin"}
    members += [(".h/g.png", b"hidden"), (".h/g.txt", b"hidden"), ("h.JPG", image(6)), ("h.tXt", b"six")]
    members += [(name, b"content") for name in lone]
    if form == "tar":
        lone |= {"photo 2.4.png": "broken tar member"}  # the second of this name
        source = open_source(write_tar(tmp_path / "a.tar", [*members, ("photo 2.4.png", image(8))]))
        assert (names(source)[1], source.shares()[1]) == ("a.tar/a.jfif", source.shares()[0])  # in one split
    else:
        source = open_source(write_files(tmp_path, dict(members)))
    found = {level(sample.image): sample.captions for sample in map(source.read, range(len(source)))}
    assert found == {1: caption(1), 2: caption(2), 3: caption(3), 4: caption(1), 6: ["six"]}
    assert {name.removeprefix("a.tar/"): cause for name, cause in skipped(source)} == lone


def test_a_header_that_tarfile_cannot_read_costs_itself(tmp_path):
    members = [*pair("a", 1), *pair("b", 2)]
    members[0] += ({"pax_headers": {"GNU.sparse.size": "9" * 5000}},)
    source = open_source(write_tar(tmp_path / "a.tar", members, format=tarfile.PAX_FORMAT))
    assert names(source) == ["a.tar/a", "a.tar/b"]
    assert [cause for _, cause in skipped(source)] == ["broken tar member"]


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"no tar" * 200, "not a tar"), (b"", "empty"), (b"\x1f\x8b" + b"0" * 2000, "compressed")],
)
def test_a_file_that_is_no_tar_is_named(tmp_path, data, words):
    (tmp_path / "zz.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"zz\.tar \(unreadable shard, {words}"):
        open_source(tmp_path)
    source = open_source(tars(tmp_path))
    assert (len(source), skipped(source)) == (COUNT, [("zz.tar", "unreadable shard")])


def test_the_key_of_captions_in_json_is_chosen(tmp_path):
    members = [*pair("a", 1), ("a.json", b'{"caption": "usual", "alt": ["one", "two"]}')]
    file = write_tar(tmp_path / "a.tar", members)
    assert open_source(file).captions(0) == caption(1)  # .txt is preferred
    assert open_source(file, caption_column="alt").captions(0) == ["one", "two"]


def test_a_tar_that_disappears_is_named_per_sample(tmp_path):
    source = open_source(tars(tmp_path))
    (tmp_path / "set-001.tar").unlink()
    assert source.read(0).captions == caption(0)
    with pytest.raises(BadSampleError, match=r"set-001\.tar/000004: unreadable shard"):
        source.read(4)
    write_tar(tmp_path / "set-000.tar", pair("other", 5))
    copy = pickle.loads(pickle.dumps(source))  # another process opens its own files
    with pytest.raises(BadSampleError, match=r"set-000\.tar.*has changed"):
        copy.read(0)
    source.read(9)
    os.truncate(tmp_path / "set-002.tar", 600)
    with pytest.raises(BadSampleError, match=r"set-002\.tar/000009: .*shorter"):
        source.read(9)


def test_many_tars_are_indexed_by_several_processes(tmp_path):
    for i in range(17):
        write_tar(tmp_path / f"{i:02}.tar", pair("a", i) + pair("b", i + 1))
    source = open_source(tmp_path)
    assert [source.name(i) for i in (0, 1, 33)] == ["00.tar/a", "00.tar/b", "16.tar/b"]
    assert level(source.read(33).image) == 17

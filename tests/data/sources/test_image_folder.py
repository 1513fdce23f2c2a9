"""Folders of images with captions next to them: dalle/data/sources/image_folder.py."""

import os
from unittest.mock import Mock

import pytest

from dalle.data import open_source
from dalle.data.bad_samples import BadSampleError
from dalle.data.sources.image_folder import MAX_BYTES
from tests.helpers.formats import COUNT, all_captions, folder, image, names, skipped, write_files


def test_links_out_of_a_folder_are_refused(tmp_path):
    outside = folder(tmp_path / "outside")
    place = write_files(tmp_path / "set", {"a.png": image(1), "a.txt": "words", "b.txt": "words"})
    (place / "b.png").symlink_to(outside / "p001.png")
    (place / "more").symlink_to(outside, target_is_directory=True)
    source = open_source(place)
    assert names(source) == ["a.png"]
    assert skipped(source) == [("b.png", "leaves the folder"), ("more", "leaves the folder")]
    (place / "a.txt").unlink()
    (place / "a.txt").symlink_to(outside / "p001.txt")  # after it was opened
    with pytest.raises(BadSampleError, match=r"leaves the folder .*p001\.txt, which is not read; give"):
        source.read(0)


def test_a_link_to_the_folder_and_links_within_are_followed(tmp_path):
    place = folder(write_files(tmp_path / "set", {"zz.txt": "again"}))
    (place / "zz.png").symlink_to("p001.png")
    (tmp_path / "link").symlink_to(place)
    source = open_source(tmp_path / "link")
    assert (len(source), source.read(COUNT).captions) == (COUNT + 1, ["again"])


def test_a_cycle_of_links_is_no_file(tmp_path):
    write_files(tmp_path, {"a.png": image(1), "a.txt": "words", "b.txt": "words"})
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "again").symlink_to(tmp_path)
    assert names(open_source(tmp_path)) == ["a.png"]
    write_files(tmp_path, {"table.csv": "image,caption\nb.png,words\n"})
    with pytest.raises(BadSampleError, match=r"b\.png: missing twin"):
        open_source(tmp_path / "table.csv").read(0)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    denied = PermissionError(13, "denied", str(tmp_path / "lost+found"))
    monkeypatch.setattr("os.scandir", Mock(side_effect=denied))
    with pytest.raises(ValueError, match=r"lost\+found \(unreadable folder, denied\)"):
        open_source(tmp_path)


def test_what_is_no_file_or_too_large_is_not_read(tmp_path, monkeypatch):
    write_files(tmp_path, {"a.png": image(1), "a.txt": "w" * 200, "b.csv": "image,caption\npipe.png,one\n"})
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadSampleError, match=r"pipe\.png: missing twin \(expected a file"):
        open_source(tmp_path / "b.csv").read(0)
    monkeypatch.setitem(MAX_BYTES, "txt", 100)
    with pytest.raises(BadSampleError, match=r"a\.txt: missing twin \(expected a file of at most 100 bytes"):
        open_source(tmp_path).read(0)


def test_suffixes_may_be_in_capitals(tmp_path):
    write_files(tmp_path, {"A.JPG": image(1), "A.TXT": "one\ntwo", "list.csv": "image,caption\nA.JPG,x\n"})
    write_files(tmp_path, {"B.JPG": image(1), "B.JSON": '{"caption": "three"}'})
    source = open_source(tmp_path)
    assert (len(skipped(source)), all_captions(source)) == (1, [["one", "two"], ["three"]])


def test_lower_case_and_text_are_preferred(tmp_path):
    write_files(tmp_path, {"a.png": image(1)})
    for suffix, text in (("JSON", '"four"'), ("json", '"three"'), ("TXT", "two"), ("txt", "one")):
        write_files(tmp_path, {f"a.{suffix}": text})
        assert open_source(tmp_path).captions(0) == [text.strip('"')]


def test_lines_of_captions_end_at_line_feeds_and_carriage_returns_only(tmp_path):
    write_files(tmp_path, {"a.png": image(1), "a.txt": "a\u2028b\x85c\vd\re\r\nf\n\u200b\nNone\n"})
    assert open_source(tmp_path).captions(0) == ["a\u2028b\x85c\vd", "e", "f"]


def test_captions_in_json(tmp_path):
    write_files(tmp_path, {"a.png": image(1), "a.json": '{"alt": "one", "title": "two"}'})
    assert open_source(tmp_path, caption_column="alt, title").captions(0) == ["one", "two"]
    write_files(tmp_path, {"a.json": "[" * 100_000})
    with pytest.raises(BadSampleError, match="broken row"):
        open_source(tmp_path).read(0)

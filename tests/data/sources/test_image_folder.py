"""Folders of images with captions beside them: dalle/data/sources/image_folder.py."""

import pytest

from dalle.data import open_source
from dalle.data.bad_samples import BadSampleError
from tests.helpers.formats import COUNT, all_captions, folder, image, names, skipped


def test_links_out_of_a_folder_are_refused(tmp_path):
    (tmp_path / "set" / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    folder(tmp_path / "outside")
    for name in ("a", "b"):
        (tmp_path / "set" / f"{name}.txt").write_text("words")
    (tmp_path / "set" / "a.png").write_bytes(image(1))
    (tmp_path / "set" / "b.png").symlink_to(tmp_path / "outside" / "p001.png")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "outside", target_is_directory=True)
    source = open_source(tmp_path / "set")
    assert names(source) == ["a.png"]
    assert skipped(source) == [("b.png", "leaves the folder"), ("more", "leaves the folder")]


def test_a_caption_file_that_becomes_a_link_out_is_not_read(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "set" / "a.png").write_bytes(image(1))
    (tmp_path / "set" / "a.txt").write_text("mine")
    source = open_source(tmp_path / "set")
    (tmp_path / "set" / "a.txt").unlink()
    (tmp_path / "set" / "a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(BadSampleError, match="leaves the folder"):
        source.read(0)


def test_a_link_to_the_folder_and_links_within_are_followed(tmp_path):
    (tmp_path / "set").mkdir()
    folder(tmp_path / "set")
    (tmp_path / "set" / "zz.png").symlink_to("p001.png")
    (tmp_path / "set" / "zz.txt").write_text("again")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    source = open_source(tmp_path / "link")
    assert (len(source), source.read(COUNT).captions) == (COUNT + 1, ["again"])


def test_a_cycle_of_links_is_no_file(tmp_path):
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("words")
    (tmp_path / "again").symlink_to(tmp_path)
    assert names(open_source(tmp_path)) == ["a.png"]
    (tmp_path / "table.csv").write_text("image,caption\nb.png,words\n")
    with pytest.raises(BadSampleError, match=r"b\.png: missing twin"):
        open_source(tmp_path / "table.csv").read(0)


def test_suffixes_may_be_in_capitals(tmp_path):
    for name, suffix, text in (("A", "TXT", "one\ntwo"), ("B", "JSON", '{"caption": "three"}')):
        (tmp_path / f"{name}.JPG").write_bytes(image(1))
        (tmp_path / f"{name}.{suffix}").write_text(text)
    (tmp_path / "list.csv").write_text("image,caption\nA.JPG,other\n")
    source = open_source(tmp_path)
    assert (skipped(source), all_captions(source)) == ([], [["one", "two"], ["three"]])


def test_lower_case_and_text_are_preferred(tmp_path):
    (tmp_path / "a.png").write_bytes(image(1))
    for suffix, text in (("JSON", '"four"'), ("json", '"three"'), ("TXT", "two"), ("txt", "one")):
        (tmp_path / f"a.{suffix}").write_text(text)
        assert open_source(tmp_path).captions(0) == [text.strip('"')]


def test_captions_in_json(tmp_path):
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "a.json").write_text('{"alt": "one", "title": "two"}')
    assert open_source(tmp_path, caption_column="alt, title").captions(0) == ["one", "two"]
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(BadSampleError, match="broken row"):
        open_source(tmp_path).read(0)

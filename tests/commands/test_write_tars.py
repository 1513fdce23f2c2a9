"""WebDataset tars of any source: dalle/commands/write_tars.py."""

import os
import shutil
import tarfile
from dataclasses import dataclass
from unittest.mock import Mock

import pytest
from PIL import Image

from dalle.commands.write_tars import SUFFIXES, write_tars
from dalle.data.config import IMAGE_SUFFIXES
from dalle.data.sources import open_source
from dalle.types import RawSample
from tests.helpers.formats import image

LOST = ValueError("sample 0: lost")


@dataclass
class Listed:
    """A source that holds its records; an exception is raised when it is read."""

    records: list

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> RawSample:
        if isinstance(self.records[index], BaseException):
            raise self.records[index]
        return self.records[index]


def listed(count):
    return Listed([RawSample(str(i), image(i), [f"c {i}"]) for i in range(count)])


def members(file) -> dict[str, bytes]:
    with tarfile.open(file) as tar:
        assert all((m.mtime, m.uid, m.uname, m.isreg()) == (0, 0, "", True) for m in tar.getmembers())
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_every_sample_is_in_one_tar_by_number_and_true_suffix(tmp_path):
    data = [image(1, form=kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
    source = Listed([RawSample(f"{i}.jpg", d, [f"caption {i}", "猫\nقط"]) for i, d in enumerate(data)])
    assert write_tars(source, tmp_path / "tars", shard_size=2) == (3, 5, [])
    files = sorted((tmp_path / "tars").iterdir())
    assert [file.name for file in files] == ["00000.tar", "00001.tar", "00002.tar"]
    assert list(members(files[0])) == ["000000000.jpg", "000000000.txt", "000000001.png", "000000001.txt"]
    assert list(members(files[2])) == ["000000004.bmp", "000000004.txt"]
    assert members(files[1])["000000002.webp"] == data[2]
    assert members(files[1])["000000003.txt"].decode() == "caption 3\n猫 قط"


def test_the_same_source_gives_the_same_bytes(tmp_path):
    for name in "ab":
        write_tars(listed(7), tmp_path / name, shard_size=3)
    first, second = ([file.read_bytes() for file in sorted((tmp_path / name).iterdir())] for name in "ab")
    assert first == second
    assert len(first) == 3


def test_what_cannot_be_packed_is_told_and_keeps_its_number(tmp_path):
    records = [LOST, RawSample("text", b"no image", ["a"]), RawSample("mute", image(1), [" \n"])]
    records += [RawSample("good", image(1), ["b"]), RawSample("icon", image(1, form="PCX"), ["c"])]
    *_, left_out = write_tars(Listed(records), tmp_path)
    known = {end for end, kind in Image.registered_extensions().items() if kind in SUFFIXES}
    assert known <= {*IMAGE_SUFFIXES}
    assert list(members(tmp_path / "00000.tar")) == ["000000003.png", "000000003.txt"]
    said = ["sample 0: lost", "text: wrong type", "mute: no caption", "icon: an image of type PCX"]
    assert [text[: len(start)] for text, start in zip(left_out, said, strict=True)] == said


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_run_that_dies_leaves_no_half_set_and_the_same_command_writes_it(tmp_path, monkeypatch, n):
    """At the n-th tar of three that gets its name; and before."""
    out, replace, calls = tmp_path / "out", os.replace, []
    with pytest.raises(KeyboardInterrupt):
        write_tars(Listed([*listed(3).records, KeyboardInterrupt()]), out, shard_size=2)
    assert not any(out.iterdir())

    def killed(*names):
        calls.append(names)
        if len(calls) == n:
            raise KeyboardInterrupt
        replace(*names)

    with monkeypatch.context() as during:
        during.setattr(os, "replace", killed)
        during.setattr(shutil, "rmtree", Mock())  # a killed command removes nothing
        with pytest.raises(KeyboardInterrupt):
            write_tars(listed(5), out, shard_size=2)
    write_tars(listed(5), out, shard_size=2)
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    (out / ".partial").mkdir()
    with pytest.raises(ValueError, match=r"holds other tars, such as 0000[12]\.tar"):
        write_tars(listed(1), out, shard_size=2)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shard_size must be positive"):
        write_tars(listed(1), tmp_path, shard_size=0)
    with pytest.raises(ValueError, match="none of 2 samples can be packed: sample 0: lost"):
        write_tars(Listed([LOST, LOST]), tmp_path)
    write_tars(listed(1), tmp_path)
    with pytest.raises(ValueError, match="holds tars already"):
        write_tars(listed(1), tmp_path)


def test_the_command_packs_a_folder_that_opens_as_tars(tmp_path, script):
    (tmp_path / "mine").mkdir()
    for i in range(5):
        (tmp_path / "mine" / f"{i}.png").write_bytes(b"broken" if i == 3 else image(i))
        (tmp_path / "mine" / f"{i}.txt").write_text(f"number {i}\nقط {i}", encoding="utf-8")
    words = ["--path", "mine", "--out", "tars", "--shard-size", "2"]
    assert "4 images in 2 tars; 1 left out" in script("write_tars", *words).out
    source = open_source(tmp_path / "tars")
    samples = [(sample.image, sample.captions) for sample in map(source.read, range(len(source)))]
    assert samples == [(image(i), [f"number {i}", f"قط {i}"]) for i in (0, 1, 2, 4)]
    assert "--out is missing" in script("write_tars", *words[:2]).err

"""WebDataset tars of any source: dalle/data/webdataset_writer.py, dalle/commands/write_tars.py."""

import io
import tarfile
from dataclasses import dataclass

import pytest
from PIL import Image

from dalle.data.sources import open_source
from dalle.data.webdataset_writer import write_tars
from dalle.types import RawSample


def image(kind: str, color: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (color, 0, 0)).save(file, kind)
    return file.getvalue()


LOST = ValueError("sample 0: lost")


@dataclass
class Listed:
    """A source that holds its records; an exception is raised when it is read."""

    records: list
    hash: str = "listed"

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> RawSample:
        record = self.records[index]
        if isinstance(record, BaseException):
            raise record
        return record


def members(file) -> dict[str, bytes]:
    with tarfile.open(file) as tar:
        assert all((m.mtime, m.uid, m.uname, m.isreg()) == (0, 0, "", True) for m in tar.getmembers())
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_every_sample_is_in_one_tar_by_number_and_true_suffix(tmp_path):
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]
    records = [RawSample(f"{i}.jpg", image(kind), [f"caption {i}", "猫\nقط"]) for i, kind in enumerate(kinds)]
    counted = []
    done = write_tars(Listed(records), tmp_path / "tars", shard_size=2, progress=counted.append)
    files = sorted((tmp_path / "tars").iterdir())
    assert [file.name for file in files] == ["00000.tar", "00001.tar", "00002.tar"]
    assert (done.tars, done.images, done.left_out, sum(counted)) == (3, 5, [], 5)
    assert list(members(files[0])) == ["000000000.jpg", "000000000.txt", "000000001.png", "000000001.txt"]
    assert list(members(files[2])) == ["000000004.bmp", "000000004.txt"]
    assert members(files[1])["000000002.webp"] == records[2].image
    assert members(files[1])["000000003.txt"].decode() == "caption 3\n猫 قط"


def test_the_same_source_gives_the_same_bytes(tmp_path):
    source = Listed([RawSample(str(i), image("PNG", i), [f"c {i}"]) for i in range(7)])
    for name in "ab":
        write_tars(source, tmp_path / name, shard_size=3)
    first, second = ([file.read_bytes() for file in sorted((tmp_path / name).iterdir())] for name in "ab")
    assert first == second
    assert len(first) == 3


def test_what_cannot_be_packed_is_told_and_keeps_its_number(tmp_path):
    good = image("PNG")
    records = [LOST, RawSample("text", b"no image", ["a"]), RawSample("mute", good, [" \n"])]
    records += [RawSample("good", good, ["b"]), RawSample("icon", image("PCX"), ["c"])]
    done = write_tars(Listed(records), tmp_path)
    assert list(members(tmp_path / "00000.tar")) == ["000000003.png", "000000003.txt"]
    said = ["sample 0: lost", "text: not an image", "mute: no caption", "icon: an image of type PCX"]
    assert [text[: len(start)] for text, start in zip(done.left_out, said, strict=True)] == said


def test_a_run_that_dies_leaves_no_tar_that_is_not_whole(tmp_path):
    records = [RawSample(str(i), image("PNG"), ["c"]) for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        write_tars(Listed([*records, KeyboardInterrupt()]), tmp_path, shard_size=2)
    assert [file.name for file in tmp_path.glob("*.tar")] == ["00000.tar"]


def test_what_cannot_be_is_refused(tmp_path):
    good = Listed([RawSample("a", image("PNG"), ["a"])])
    with pytest.raises(ValueError, match="shard_size must be positive"):
        write_tars(good, tmp_path, shard_size=0)
    with pytest.raises(ValueError, match="none of 2 samples can be packed: sample 0: lost"):
        write_tars(Listed([LOST, LOST]), tmp_path)
    write_tars(good, tmp_path)
    with pytest.raises(ValueError, match="holds tars already"):
        write_tars(good, tmp_path)


def test_the_command_packs_a_folder_that_opens_as_tars(tmp_path, script):
    (tmp_path / "mine").mkdir()
    for i in range(5):
        (tmp_path / "mine" / f"{i}.png").write_bytes(image("PNG", i))
        (tmp_path / "mine" / f"{i}.txt").write_text(f"number {i}\nقط {i}", encoding="utf-8")
    (tmp_path / "mine" / "3.png").write_bytes(b"broken")
    words = ["--path", "mine", "--out", "tars", "--shard-size", "2"]
    assert "4 images in 2 tars; 1 left out" in script("write_tars", *words).out
    source = open_source(tmp_path / "tars")
    samples = [source.read(i) for i in range(len(source))]
    assert [sample.captions for sample in samples] == [[f"number {i}", f"قط {i}"] for i in (0, 1, 2, 4)]
    assert [sample.image for sample in samples] == [image("PNG", i) for i in (0, 1, 2, 4)]
    assert "--out is missing" in script("write_tars", *words[:2]).err

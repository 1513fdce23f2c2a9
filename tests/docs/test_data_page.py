"""The commands of docs/data.md, in their order, on small sets that lie as the page says they do."""

import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dalle.data import open_source
from tests.commands.test_check_data import scene
from tests.commands.test_convert_captions import CC, COCO, SVG, images, write
from tests.helpers.formats import image, write_tar

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
SCRIPTS = [command for command in COMMANDS if command.startswith("python scripts/")]
TINY = (
    "--model.widths 8 8 --model.downsample_factor 2 --model.vocab-size 16 --data.resolution 16 --crop 16 "
    "--device cpu"
)
SMALLER = {  # words put behind a command so that it takes seconds
    "write_tars": "",
    "check_data": "--data.workers 0 --data.resolution 16",
    "train_dvae": (
        f"{TINY} --data.workers 0 --steps 1 --train.batch-size 2 --eval-samples 1 --data.val-fraction 0.3"
    ),
    "convert_captions": "",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Each set of the page, of a few images, in the folder in which the commands are given."""
    own_images(tmp_path / "my")
    whole_sets(tmp_path)
    sets_of_links(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_images(my: Path) -> None:
    """my/images, one of them there twice, and my/table.csv."""
    (my / "images").mkdir(parents=True)
    rows = ["image,caption"]
    for i in range(24):
        scene(i).save(my / "images" / f"{i}.png")
        (my / "images" / f"{i}.txt").write_text(f"an image of number {i}")
        rows.append(f"images/{i}.png,an image of number {i}")
    scene(0).save(my / "images" / "twice.png")
    (my / "images" / "twice.txt").write_text("seen before")
    (my / "table.csv").write_text("\n".join(rows))


def whole_sets(place: Path) -> None:
    for part in ("train2017", "val2017"):
        write(place / "coco" / "annotations" / f"captions_{part}.json", json.dumps(COCO))
        images(place / "coco" / part, "000000179765.jpg")
    name = "COCO_val2014_000000391895.jpg"
    images(place / "coco" / "val2014", name)
    image = {"filepath": "val2014", "filename": name, "sentences": [{"raw": "A man with a helmet."}]}
    write(place / "dataset_coco.json", json.dumps({"images": [image], "dataset": "coco"}))
    write(place / "results_20130124.token", "1000092795.jpg#0\tTwo young guys .")
    images(place / "flickr30k-images", "1000092795.jpg")
    line = {"dataset_id": "open_images_train", "image_id": "000a1249af2bc5f0", "caption": "a tree"}
    write(place / "narratives" / "open_images_train_v6-00000-of-00010.jsonl", json.dumps(line))
    images(place / "open-images", "000a1249af2bc5f0.jpg")
    write(place / "clipart" / "food" / "cup.svg", SVG.format(title="soft drink in a cup"))
    images(place / "clipart" / "food", "cup.png")


def sets_of_links(place: Path) -> None:
    """As they are published, without a line that names the columns."""
    write(place / "Train_GCC-training.tsv", *CC[:2])
    images(place / "cc3m", "00000/000000001.jpg")
    write(place / "cc12m.tsv", *("\t".join(line.split("\t")[::-1]) for line in CC[:2]))
    images(place / "cc12m", f"{hashlib.md5(CC[0].split(chr(9))[1].encode()).hexdigest()}.jpg")
    post = {"image_id": "1", "subreddit": "birds", "url": "https://i.redd.it/1.jpg", "caption": "a wren"}
    write(place / "annotations" / "birds_2017.json", json.dumps({"info": {}, "annotations": [post]}))
    images(place / "images", "birds/1.jpg")


def test_every_command_of_the_page_is_of_a_kind_that_is_tested():
    others = [command for command in COMMANDS if command not in SCRIPTS]
    assert [command.split()[0] for command in others] == ["sed", "img2dataset"]
    assert {Path(command.split()[1]).stem for command in SCRIPTS} == set(SMALLER)


def test_the_commands_of_the_page_run_in_their_order(place, typed):
    for command in SCRIPTS:
        typed(f"{command} {SMALLER[Path(shlex.split(command)[1]).stem]}", place)
    assert len(open_source(place / "my" / "tars")) == 24
    assert (place / "twice.txt").read_text() == "twice.png\n"
    assert (place / "runs" / "dvae" / "checkpoints" / "latest").is_file()
    for command in SCRIPTS:
        words = shlex.split(command)
        if "convert_captions" in command:  # what was written is a set of one image that can be read
            out, where = (place / words[words.index(word) + 1] for word in ("--out", "--images"))
            source = open_source(out, images=None if where.is_relative_to(out.parent) else where)
            assert len(source) == 1, command
            assert source.read(0).captions, command
    assert open_source(place / "coco", part="train").name(0) == "train2017/000000179765.jpg"
    assert open_source(place / "coco", part="held_out").name(0) == "val2017/000000179765.jpg"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's sed")
def test_the_line_for_the_downloader_is_put_first(place):
    (command,) = [command for command in COMMANDS if command.startswith("sed")]
    subprocess.run(command, shell=True, cwd=place, check=True)
    lines = (place / "cc12m.tsv").read_text().splitlines()
    assert lines[0] == "url\tcaption"
    assert len(lines) == 3


def test_what_the_downloader_writes_is_opened_as_it_is(tmp_path):
    """Beside 00000.tar lie its statistics and a Parquet of the links; each member .json holds the whole
    record."""
    (command,) = [command for command in COMMANDS if command.startswith("img2dataset")]
    assert "--output_format webdataset --output_folder cc12m" in command
    record = {
        "url": "http://a",
        "caption": "a bus",
        "key": "000000000",
        "status": "success",
        "error_message": None,
    }
    members = {"jpg": image(3), "json": json.dumps(record).encode(), "txt": b"a bus"}
    (tmp_path / "cc12m").mkdir()
    write_tar(
        tmp_path / "cc12m" / "00000.tar", [(f"000000000.{suffix}", data) for suffix, data in members.items()]
    )
    (tmp_path / "cc12m" / "00000_stats.json").write_text("{}")
    (tmp_path / "cc12m" / "00000.parquet").write_bytes(b"PAR1")
    source = open_source(tmp_path / "cc12m")
    assert (len(source), source.read(0).captions, list(source.skipped)) == (1, ["a bus"], [])

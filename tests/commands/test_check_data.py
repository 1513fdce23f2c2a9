"""The report on a dataset: dalle/commands/check_data.py."""

import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from dalle.commands.check_data import CheckDataArgs, check_data
from dalle.data import DataConfig, open_dataset, statistics
from dalle.data.config import PAPER_FILTERS, FilterConfig
from dalle.data.statistics import TILE
from dalle.text import TextTokenizerConfig, train_text_tokenizer
from tests.helpers import scenes
from tests.helpers.scenes import put, scene, write_scenes_tar

BAD = {i: cause for i, cause in scenes.BAD.items() if cause != "missing twin"}


def check(path, filters=PAPER_FILTERS, workers=0, val_path=None, **settings):
    data = DataConfig(path=str(path), filters=filters, workers=workers, resolution=32, val_path=val_path)
    return check_data(CheckDataArgs(data, **{"out": path.parent / "out"} | settings))


def causes(named):
    return {int(Path(line["name"]).stem): line["cause"] for line in named}


def logged(out):
    return [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]


def skipped_in_training(folder, filters):
    dataset = open_dataset(DataConfig(path=str(folder), resolution=8, filters=filters, val_path=str(folder)))
    return dataset.load([(0, i) for i in range(dataset.size)]).skipped


@pytest.fixture
def bad_tar(tmp_path):
    """Twenty samples, five of them bad, each in its own way."""
    return write_scenes_tar(tmp_path / "set.tar", BAD)


@pytest.fixture
def folder(tmp_path):
    """Seven images, four of which some filter drops, two of which are the same."""
    place = tmp_path / "set"
    put(place, "a.png", scene(1, (200, 200)), "a red house on the hill")
    put(place, "b.png", scene(2, (100, 40)), "a very long bridge over the river")
    put(place, "c.png", scene(3, (40, 60)), "photographed on 3 May 2009")
    put(place, "d.png", scene(4, (60, 40)), "cat\na black cat asleep on the sofa")
    put(place, "e\udce9.jpg", scene(1, (200, 200)).resize((130, 130)), "the same house, smaller, saved again")
    put(place, "f.png", scene(5, (20, 24)), "ein kleines Haus auf dem Berg und ein Hund davor")
    put(place, "g.png", scene(6, (50, 50)), "cat\nphotographed on 3 May 2009")
    return place


def test_bad_samples_are_named_with_their_causes(bad_tar, tmp_path, monkeypatch):
    report = check(bad_tar)
    bad = report["bad"]
    assert causes(bad["named"]) == causes(logged(tmp_path / "out")) == BAD
    assert (bad["samples"], bad["of"], bad["fraction"]) == (5, 20, 0.25)
    assert bad["causes"] == dict.fromkeys(BAD.values(), 1)
    assert (report["samples"], report["usable"], report["captions"]) == (20, 15, 15)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    monkeypatch.setattr("dalle.commands.check_data.MAX_NAMED", 2)
    bad = check(bad_tar)["bad"]
    assert (len(bad["named"]), bad["samples"], sum(bad["causes"].values())) == (2, 5, 5)
    assert len(logged(tmp_path / "out")) == 5
    put(tmp_path / "empty", "a.png", scene(0), "\n")
    (tmp_path / "empty" / "list.csv").write_text("no bad sample")
    report = check(tmp_path / "empty", sheet=0)  # replaces the first
    assert (report["usable"], report["bad"]["samples"], report["bad"]["of"], report["words"]) == (0, 1, 1, {})
    assert len(logged(tmp_path / "out")) == 2
    assert not (tmp_path / "out" / "contact_sheet.png").exists()


def test_any_number_of_workers_gives_the_same(bad_tar, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 3)
    for workers in (0, 2):
        check(bad_tar, workers=workers, out=tmp_path / str(workers))
    for name in ("report.json", "bad_samples.jsonl", "contact_sheet.png"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_too_many_bad_samples_fail_after_everything_is_written(bad_tar, tmp_path, monkeypatch):
    check(bad_tar, max_bad=0.25)
    with pytest.raises(ValueError, match=r"5 of 20 .*--max-bad.*truncated"):
        check(bad_tar, max_bad=0.24, out=tmp_path / "again")
    assert (tmp_path / "again" / "report.json").exists()
    monkeypatch.setattr("dalle.data.bad_samples.MIN_BAD", 4)  # as a training
    with pytest.raises(ValueError, match="5 of 20 samples"):
        check(bad_tar)


@pytest.mark.parametrize(
    ("path", "words"), [(None, "--data.path"), ("shapes", "nothing to check"), ("none", "none")]
)
def test_a_path_without_data_is_refused(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        check_data(CheckDataArgs(data=DataConfig(path=path)))


@pytest.mark.parametrize("settings", [{"text_len": 1}, {"max_bad": 1.5}, {"max_bad": -0.1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CheckDataArgs(**settings)


def test_sizes_captions_and_what_training_drops_are_counted(folder, bad_tar, capsys):
    filters = FilterConfig(min_words=2, min_size=30)
    report = check(folder, filters, val_path=str(bad_tar))
    assert f"{bad_tar} is not read" in capsys.readouterr().out
    assert (report["samples"], report["usable"], report["captions"]) == (7, 7, 9)
    assert [report["shorter_side"][name] for name in ("min", "median", "max")] == [20, 40, 200]
    assert report["smaller_than_resolution"] == {"samples": 1, "of": 7, "fraction": 0.142857}
    assert [report["aspect"][name] for name in ("min", "median", "max")] == [0.67, 1, 2.5]
    assert "tokens" not in report
    assert list(report["filters"]) == ["boilerplate", "max_aspect_ratio", "min_words", "min_size"]
    skipped = skipped_in_training(folder, filters)
    assert report["all_filters"]["samples"] == len(skipped) == 4
    assert {bad.name for bad in skipped} == {"b.png", "c.png", "f.png", "g.png"}


def test_each_filter_of_the_paper_is_tried_with_examples(folder):
    pytest.importorskip("py3langid")
    report = check(folder)
    named = {
        name: [example["name"] for example in numbers["examples"]]
        for name, numbers in report["filters"].items()
    }
    dropped = {"boilerplate": ["c.png"], "max_aspect_ratio": ["b.png"], "min_words": []}
    assert named == dropped | {"language": ["f.png"]}
    example = {"name": "b.png", "size": [100, 40], "captions": ["a very long bridge over the river"]}
    assert report["filters"]["max_aspect_ratio"]["examples"] == [example]
    assert report["all_filters"]["samples"] == 4  # g too: each of its captions falls to another filter


def test_without_its_detector_the_language_is_not_tried(folder, monkeypatch, capsys):
    missing = Mock(side_effect=ImportError("needs py3langid"))
    monkeypatch.setattr("dalle.data.filters.language_detector", missing)
    assert "language" not in check(folder)["filters"]
    assert "needs py3langid" in capsys.readouterr().out


def test_tokens_are_counted_and_those_cut(folder, tmp_path):
    captions = [line for file in sorted(folder.glob("*.txt")) for line in file.read_text().splitlines()]
    text = train_text_tokenizer(captions, TextTokenizerConfig(vocab_size=300))
    text.save(tmp_path / "text.json")
    lengths = sorted(len(text.encode(caption)) for caption in captions)
    limit = lengths[-3]
    tokens = check(folder, text_tokenizer=tmp_path / "text.json", text_len=limit + 1)["tokens"]
    assert (tokens["min"], tokens["max"], tokens["max_caption_len"]) == (lengths[0], lengths[-1], limit)
    assert tokens["cut"]["samples"] == sum(length > limit for length in lengths) > 0


def test_duplicates_are_listed_for_training(folder, tmp_path):
    exclude_list = tmp_path / "lists" / "duplicates.txt"
    duplicates = check(folder, exclude_list=exclude_list)["duplicates"]
    assert (duplicates["samples"], duplicates["named"]) == (1, [{"copy": "e?.jpg", "of": "a.png"}])
    assert exclude_list.read_text(errors="replace").endswith(".jpg\n")
    filters = FilterConfig(boilerplate=False, max_aspect_ratio=None, exclude_list=exclude_list)
    skipped = skipped_in_training(folder, filters)
    assert [(bad.name, bad.cause) for bad in skipped] == [("e\udce9.jpg", "filter:exclude_list")]


def test_the_first_examples_and_images_of_the_whole_dataset_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 4)
    for i in range(30):
        image = Image.new("RGB", (40, 40), (8 * i, 0, 0))
        put(tmp_path / "set", f"{i:02}.png", image, f"{i} " + "long " * 60)
    numbers = check(tmp_path / "set", FilterConfig(min_words=99), sheet=3)["filters"]["min_words"]
    assert numbers["samples"] == 30
    assert [example["name"] for example in numbers["examples"]] == [f"{i:02}.png" for i in range(5)]
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    middles = [sheet.getpixel((10 + TILE // 2 + i * (TILE + 10), 10 + TILE // 2)) for i in range(3)]
    assert middles == [(0, 0, 0), (80, 0, 0), (160, 0, 0)]
    assert sheet.height < 2.5 * TILE  # captions are shortened


def test_names_and_captions_that_are_not_utf8_are_written(tmp_path):
    for name in (b"\xff.png", b"\xfe.png"):
        put(tmp_path / "set", os.fsdecode(name), scene(name[0]), "a house")
    (tmp_path / "set" / os.fsdecode(b"\xfe.txt")).unlink()
    (tmp_path / "set" / os.fsdecode(b"\xfe.json")).write_text('"\\ud800 photo"')
    report = check(tmp_path / "set", FilterConfig(min_words=9))
    assert report["filters"]["min_words"]["examples"][0]["name"] == "?.png"
    assert report["bad"]["causes"] == {"caption not UTF-8": 1}
    assert report["bad"]["named"][0]["name"] == "?.json"


def test_the_command_prints_the_report_and_sets_its_exit_status(script, bad_tar, tmp_path):
    words = ["--data.path", bad_tar, "--data.workers", "0", "--data.resolution", "37"]
    done = script("check_data", *words)
    assert done.code == 0
    for line in (
        "15 usable images with 15 captions",
        "bad samples: 5 of 20 (25.00%)",
        "1  truncated, for example set.tar/02",
        "no crop fits: 15 of 15 (100.00%)",
        "duplicates: 0 of 15",
        "width / height: median 1.11",
        "words per caption: median 6",
        "0  boilerplate (0.00%)",
    ):
        assert line in done.out
    assert (tmp_path / "runs" / "check" / "report.json").is_file()
    assert script("check_data", *words, "--max-bad", "0.1").code == 1

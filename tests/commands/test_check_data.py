"""Everything read once and described: dalle/commands/check_data.py, dalle/data/statistics.py, dalle/data/histograms.py."""

import io
import json
import runpy
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle.commands import check_data as stage
from dalle.commands.check_data import CheckDataArgs, check_data
from dalle.data import DataConfig, open_dataset
from dalle.data import statistics as examination
from dalle.data.config import PAPER_FILTERS, FilterConfig
from dalle.data.histograms import aspect, doublings, plain, share, summary, tell_bars, tell_summary
from dalle.data.sources import open_source
from dalle.data.statistics import TILE, DatasetScanner, DatasetStats, examine, find_duplicates
from dalle.text import TextTokenizerConfig, train_text_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_data.py"


def scene(seed, size=(40, 36)):
    """A smooth image with large things in it."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def run_of(path, out, filters=PAPER_FILTERS, workers=0, resolution=32, **settings):
    data = DataConfig(path=str(path), filters=filters, workers=workers, resolution=resolution)
    return CheckDataArgs(data=data, out=out, **settings)


def put(folder, name, image, caption):
    folder.mkdir(exist_ok=True)
    image.save(folder / name)
    (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


# What is broken.


BAD = {2: "truncated", 5: "wrong type", 9: "caption not UTF-8", 12: "empty caption", 14: "broken tar member"}


@pytest.fixture
def broken_tar(tmp_path):
    """Twenty pairs, five of them broken, each in its own way."""
    file = tmp_path / "set.tar"
    with tarfile.open(file, "w") as tar:
        for i in range(20):
            image = encoded(scene(i))
            image = {"truncated": image[:200], "wrong type": b"<html>"}.get(BAD.get(i), image)
            text = f"an image with the number {i}".encode()
            text = {"caption not UTF-8": "schön".encode("latin-1"), "empty caption": b"\n"}.get(
                BAD.get(i), text
            )
            for name, data in ((f"{i:02}.png", image), (f"{i:02}.txt", text)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with tarfile.open(file) as tar:
        damaged = tar.getmember("14.png").offset
    data = bytearray(file.read_bytes())
    data[damaged + 130] ^= 0xFF
    file.write_bytes(data)
    return file


def number_of(named):
    return int(Path(named["name"]).stem)


def test_five_kinds_of_broken_members_are_named_and_no_others(broken_tar, tmp_path):
    report = check_data(run_of(broken_tar, tmp_path / "out"))
    broken = report["broken"]
    assert {number_of(named): named["cause"] for named in broken["named"]} == BAD
    assert (broken["samples"], broken["of"], broken["share"]) == (5, 20, 0.25)
    assert broken["causes"] == dict.fromkeys(BAD.values(), 1)
    assert (report["samples"], report["usable"], report["captions"]) == (20, 15, 15)
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {number_of(line): line["cause"] for line in lines} == BAD
    assert len(lines) == 5
    assert all(named["detail"] for named in broken["named"] if named["cause"] != "empty caption")


def test_the_report_is_written_as_returned(broken_tar, tmp_path):
    report = check_data(run_of(broken_tar, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_any_number_of_workers_gives_the_same(broken_tar, tmp_path, monkeypatch):
    monkeypatch.setattr(examination, "STRETCH", 3)
    for workers in (0, 2):
        check_data(run_of(broken_tar, tmp_path / str(workers), workers=workers))
    for name in ("report.json", "skipped.jsonl", "sheet.png"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_second_check_forgets_the_first(broken_tar, tmp_path):
    check_data(run_of(broken_tar, tmp_path / "out"))
    for i in range(3):
        put(tmp_path / "good", f"{i}.png", scene(i), "a good image")
    check_data(run_of(tmp_path / "good", tmp_path / "out", sheet=0))
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""
    assert not (tmp_path / "out" / "sheet.png").exists()


def test_no_more_than_so_many_are_named_in_the_report(broken_tar, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "NAMED", 2)
    broken = check_data(run_of(broken_tar, tmp_path / "out"))["broken"]
    assert (len(broken["named"]), broken["samples"], sum(broken["causes"].values())) == (2, 5, 5)
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 5


def test_nothing_usable_is_a_report_too(tmp_path):
    put(tmp_path / "set", "a.png", scene(0), "\n")
    report = check_data(run_of(tmp_path / "set", tmp_path / "out"))
    assert (report["usable"], report["broken"]["samples"], report["words"]) == (0, 1, {})
    assert not (tmp_path / "out" / "sheet.png").exists()


# When it fails.


def test_by_default_a_few_broken_ones_are_borne(broken_tar, tmp_path):
    check_data(run_of(broken_tar, tmp_path / "out"))


@pytest.mark.parametrize(("most", "fails"), [(0.0, True), (0.24, True), (0.25, False), (1.0, False)])
def test_more_than_max_broken_fails_after_all_is_written(broken_tar, tmp_path, most, fails):
    run = run_of(broken_tar, tmp_path / "out", max_broken=most)
    if not fails:
        check_data(run)
    else:
        with pytest.raises(
            ValueError, match=r"5 of 20 samples cannot be used, more than --max-broken 0.*truncated"
        ):
            check_data(run)
    assert (tmp_path / "out" / "report.json").exists()


def test_more_than_a_run_bears_fails(broken_tar, tmp_path, monkeypatch):
    monkeypatch.setattr("dalle.data.bad_samples.LEAST", 4)
    with pytest.raises(ValueError, match=r"5 of 20 samples cannot be used \(25.0%, more than 1.0%\)"):
        check_data(run_of(broken_tar, tmp_path / "out"))
    run = run_of(broken_tar, tmp_path / "out")
    check_data(replace(run, data=replace(run.data, max_bad_fraction=0.25)))


@pytest.mark.parametrize(
    ("path", "said"), [(None, "no data: give --data.path"), ("shapes", "nothing to check"), ("none", "none")]
)
def test_no_data_is_said(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        check_data(CheckDataArgs(data=DataConfig(path=path)))


def test_a_second_path_is_said_not_to_be_read(folder, broken_tar, tmp_path, capsys):
    run = run_of(folder, tmp_path / "out")
    report = check_data(replace(run, data=replace(run.data, val_path=str(broken_tar))))
    assert report["samples"] == 7
    assert f"note: {broken_tar} is not read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sheet": -1}, "sheet"),
        ({"text_len": 1}, "text_len"),
        ({"max_broken": 1.5}, "max_broken"),
        ({"max_broken": -0.1}, "max_broken"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        CheckDataArgs(**settings)


# Sizes, captions, filters.


@pytest.fixture
def folder(tmp_path):
    """Six images, four of which some filter drops, two of which are the same."""
    place = tmp_path / "set"
    put(place, "a.png", scene(1, (200, 200)), "a red house on the hill")
    put(place, "b.png", scene(2, (100, 40)), "a very long bridge over the river")
    put(place, "c.png", scene(3, (40, 60)), "photographed on 3 May 2009")
    put(place, "d.png", scene(4, (60, 40)), "cat\na black cat asleep on the sofa")
    put(place, "e.jpg", scene(1, (200, 200)).resize((130, 130)), "the same house, smaller, saved anew")
    put(place, "f.png", scene(5, (20, 24)), "ein kleines Haus auf dem Berg und ein Hund davor")
    put(place, "g.png", scene(6, (50, 50)), "cat\nphotographed on 3 May 2009")
    return place


def test_sizes_and_captions_are_counted(folder, tmp_path):
    report = check_data(run_of(folder, tmp_path / "out"))
    assert (report["samples"], report["usable"], report["captions"]) == (7, 7, 9)
    assert (report["width"]["least"], report["width"]["most"], report["width"]["median"]) == (20, 200, 60)
    assert report["shorter_side"]["histogram"] == {"16-31": 1, "32-63": 4, "64-127": 0, "128-255": 2}
    assert report["smaller_than_resolution"] == {"resolution": 32, "samples": 1, "of": 7, "share": 0.142857}
    assert report["aspect"] == {
        "square": 3,
        "wide, beyond 2:1": 1,
        "tall, up to 2:1": 1,
        "wide, up to 2:1": 1,
        "tall, up to 4:3": 1,
    }
    assert report["words"]["least"] == 1
    assert sum(report["words"]["histogram"].values()) == 9
    assert "tokens" not in report


def test_each_filter_of_the_paper_is_tried_and_shows_what_it_would_drop(folder, tmp_path):
    pytest.importorskip("py3langid")
    report = check_data(run_of(folder, tmp_path / "out"))
    filters = report["filters"]
    assert list(filters) == ["boilerplate", "aspect", "too short", "language"]
    named = {name: [example["name"] for example in filters[name]["examples"]] for name in filters}
    assert named["boilerplate"] == ["c.png"]
    assert named["aspect"] == ["b.png"]
    assert named["language"] == ["f.png"]
    assert named["too short"] == []
    assert filters["aspect"]["examples"] == [
        {"name": "b.png", "size": [100, 40], "captions": ["a very long bridge over the river"]}
    ]
    assert filters["aspect"]["samples"] == 1
    assert report["all_filters"]["samples"] == 4  # g too: each of its captions falls to another filter


def test_all_filters_leave_out_what_training_leaves_out(folder, tmp_path):
    filters = FilterConfig(min_words=2, min_size=30)
    report = check_data(run_of(folder, tmp_path / "out", filters))
    assert list(report["filters"]) == ["boilerplate", "aspect", "too short", "too small"]
    pairs = open_dataset(DataConfig(path=str(folder), resolution=8, filters=filters, val_path=str(folder)))
    skips = pairs.load([(0, i) for i in range(pairs.size)]).skipped
    assert report["all_filters"]["samples"] == len(skips) == 4
    assert {skip.name for skip in skips} == {"b.png", "c.png", "f.png", "g.png"}


def test_no_more_than_a_few_examples_of_a_filter(tmp_path, monkeypatch):
    monkeypatch.setattr(examination, "STRETCH", 4)
    for i in range(20):
        put(tmp_path / "set", f"{i:02}.png", scene(i), "cat")
    numbers = check_data(run_of(tmp_path / "set", tmp_path / "out", FilterConfig(min_words=2)))["filters"][
        "too short"
    ]
    assert numbers["samples"] == 20
    assert [example["name"] for example in numbers["examples"]] == [f"{i:02}.png" for i in range(5)]


def test_without_its_detector_the_language_is_not_tried(folder, tmp_path, monkeypatch, capsys):
    def missing(language):
        raise ImportError("filtering by language needs py3langid")

    monkeypatch.setattr(stage, "language_detector", missing)
    report = check_data(run_of(folder, tmp_path / "out"))
    assert "language" not in report["filters"]
    assert "needs py3langid; until then that filter is not tried" in capsys.readouterr().out


def test_tokens_are_counted_and_the_cut_told(folder, tmp_path):
    captions = [line for file in sorted(folder.glob("*.txt")) for line in file.read_text().splitlines()]
    text = train_text_tokenizer(captions, TextTokenizerConfig(vocab_size=300))
    text.save(tmp_path / "text_tokenizer.json")
    lengths = sorted(len(text.encode(caption)) for caption in captions)
    room = lengths[-3]
    run = run_of(folder, tmp_path / "out", text_tokenizer=tmp_path / "text_tokenizer.json", text_len=room + 1)
    tokens = check_data(run)["tokens"]
    longer = sum(length > room for length in lengths)
    assert longer in (1, 2)
    assert (tokens["least"], tokens["most"], tokens["room"]) == (lengths[0], lengths[-1], room)
    assert tokens["cut"] == share(longer, 9)


# Duplicates.


def test_duplicates_are_found_and_listed_for_training(folder, tmp_path):
    run = run_of(folder, tmp_path / "out", exclude_list=tmp_path / "lists" / "twice.txt")
    report = check_data(run)
    assert report["duplicates"] == share(1, 7) | {"named": [{"copy": "e.jpg", "of": "a.png"}]}
    assert run.exclude_list.read_text() == "e.jpg\n"
    assert Image.open(tmp_path / "out" / "duplicates.png").width > 2 * TILE
    filters = FilterConfig(boilerplate=False, max_aspect_ratio=None, exclude_list=run.exclude_list)
    pairs = open_dataset(DataConfig(path=str(folder), resolution=8, filters=filters, val_path=str(folder)))
    skipped = pairs.load([(0, i) for i in range(pairs.size)]).skipped
    assert [(skip.name, skip.cause) for skip in skipped] == [("e.jpg", "filter:exclude list")]


def test_a_list_of_no_duplicates_is_empty(broken_tar, tmp_path):
    run = run_of(broken_tar, tmp_path / "out", exclude_list=tmp_path / "twice.txt")
    assert check_data(run)["duplicates"]["samples"] == 0
    assert run.exclude_list.read_text() == ""
    assert not (tmp_path / "out" / "duplicates.png").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_duplicates_over_stretches_point_to_the_first(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(examination, "STRETCH", 3)
    seeds = [0, 1, 2, 0, 3, 4, 1, 0, 5, 6, 1]
    for i, seed in enumerate(seeds):
        put(
            tmp_path / "set",
            f"{i:02}.png",
            scene(seed, (200, 160)).resize((200 - 5 * i, 160 - 4 * i)),
            "an image",
        )
    source, found = open_source(tmp_path / "set"), DatasetStats()
    for more in examine(DatasetScanner(source, PAPER_FILTERS), workers):
        found.add(more)
    expected = [(i, seeds.index(seed)) for i, seed in enumerate(seeds) if seeds.index(seed) != i]
    assert sorted(find_duplicates(source, found, workers)) == expected


# Sheets.


def test_the_sheet_shows_images_from_the_whole_set(tmp_path):
    for i in range(30):
        put(
            tmp_path / "set",
            f"{i:02}.png",
            Image.new("RGB", (40, 40), (8 * i, 0, 0)),
            f"number {i} " + "long " * 60,
        )
    check_data(run_of(tmp_path / "set", tmp_path / "out", sheet=3))
    sheet = Image.open(tmp_path / "out" / "sheet.png")
    middles = [sheet.getpixel((10 + TILE // 2 + i * (TILE + 10), 10 + TILE // 2)) for i in range(3)]
    assert middles == [(0, 0, 0), (80, 0, 0), (160, 0, 0)]
    assert sheet.height < 2.5 * TILE  # captions are shortened


def test_text_that_is_no_unicode_is_written_all_the_same(tmp_path):
    place = tmp_path / "set"
    put(place, "a.png", scene(0), "a house")
    (place / "a.txt").unlink()
    (place / "a.json").write_text('"\\ud800 photo"')
    check_data(run_of(place, tmp_path / "out"))
    assert plain({"a": ["\ud800", 1]}) == {"a": ["\\ud800", 1]}


# Numbers in few words.


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((8, 8), "square"),
        ((4, 3), "wide, up to 4:3"),
        ((3, 4), "tall, up to 4:3"),
        ((401, 300), "wide, up to 2:1"),
        ((200, 100), "wide, up to 2:1"),
        ((100, 200), "tall, up to 2:1"),
        ((201, 100), "wide, beyond 2:1"),
        ((1, 9), "tall, beyond 2:1"),
    ],
)
def test_shapes_in_words(size, words):
    assert aspect(size) == words


def test_a_summary_against_numpy():
    values = np.random.default_rng(0).geometric(0.1, 5000)
    numbers = summary(Counter(values.tolist()))
    percentiles = {name: numbers[name] for name in ("5_of_100", "median", "95_of_100")}
    expected = np.percentile(values, [5, 50, 95], method="inverted_cdf").tolist()
    assert list(percentiles.values()) == expected
    assert (numbers["least"], numbers["most"]) == (values.min(), values.max())
    assert numbers["mean"] == pytest.approx(values.mean(), abs=0.005)
    assert sum(numbers["histogram"].values()) == 5000


def test_doublings_begin_and_end_where_there_is_something():
    assert doublings(Counter([2, 3, 3, 9])) == {"2-3": 3, "4-7": 0, "8-15": 1}
    assert doublings(Counter([0, 1, 7])) == {"0": 1, "1": 1, "2-3": 0, "4-7": 1}
    assert summary(Counter()) == {}


def test_bars_are_in_proportion(capsys):
    tell_bars("things", {"a": 3, "bcd": 1, "e": 0})
    assert capsys.readouterr().out.splitlines() == [
        "things",
        f"    a          3  {'#' * 30}",
        f"  bcd          1  {'#' * 10}",
        "    e          0",
    ]
    tell_summary("nothing", {})
    assert capsys.readouterr().out == ""


# The command.


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(*words): runs the script in an empty folder; gives exit status and what was said."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["check_data.py", *map(str, words)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            said = capsys.readouterr().out
            return (1, f"{said}{stop.code}") if isinstance(stop.code, str) else (stop.code or 0, said)
        return 0, capsys.readouterr().out

    return run


def test_the_command_tells_all_and_its_status_serves_a_script(command, broken_tar, tmp_path):
    words = ["--data.path", broken_tar, "--data.workers", "0", "--data.resolution", "37"]
    status, said = command(*words)
    assert status == 0
    for line in (
        "15 images with 15 captions can be used",
        "broken: 5 of 20 (25.00%)",
        "1  truncated, for example set.tar/02",
        "smaller than --data.resolution 37, so that no crop fits: 15 of 15 (100.00%)",
        "there twice: 0 of 15",
        "wide, up to 4:3         15  #",
        "words a caption: median 6",
        "0  boilerplate (0.00%)",
        "runs/check: report.json",
    ):
        assert line in said
    assert (tmp_path / "runs" / "check" / "report.json").is_file()
    status, said = command(*words, "--max-broken", "0.1")
    assert (
        status,
        "error: 5 of 20 samples cannot be used, more than --max-broken 0.1: skipped 5" in said,
    ) == (1, True)


def test_help_teaches(command):
    status, said = command("--help")
    assert status == 0
    for words in (
        "--max-broken",
        "--exclude-list",
        "--text-tokenizer",
        "--data.filters.min-words",
        "skipped.jsonl",
    ):
        assert words in said

"""Filters of paper section 2.3: dalle/data/filters.py."""

import pickle
import sys
from dataclasses import replace

import pytest

from dalle.data.config import FilterConfig
from dalle.data.filters import Filters, count_words, is_boilerplate, language_detector, one_by_one

OFF = FilterConfig(boilerplate=False, max_aspect_ratio=None)


def reason(captions, width=300, height=300, name=None, base=OFF, **settings):
    return Filters(replace(base, **settings)).reason(captions, width, height, name)


@pytest.mark.parametrize("caption", ["cat", "a cat", "chat noir", "猫", "x", "may", "2001", "12 monkeys"])
def test_short_captions_stay_by_default(caption):
    filters = Filters(FilterConfig())
    assert (filters.reason([caption], 30, 20), filters.captions([caption])) == (None, [caption])


@pytest.mark.parametrize(
    ("settings", "width", "height", "expected"),
    [
        ({}, 9000, 1, None),
        ({"max_aspect_ratio": 2.0}, 200, 100, None),
        ({"max_aspect_ratio": 2.0}, 201, 100, "max_aspect_ratio"),
        ({"min_size": 64}, 64, 64, None),
        ({"min_size": 64}, 63, 500, "min_size"),
    ],
)
def test_filters_of_sizes(settings, width, height, expected):
    assert reason(["photographed on 3 May 2009"], width, height, **settings) == expected


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("", 0),
        ("the dog's bowl", 3),
        ("a red-and-white cap!", 5),
        ("- ... -", 0),
        ("\u2019tis n\u00f6", 2),
        ("两只狗在雪地里", 7),
        ("Кошка на диване", 3),
        ("snake_case", 2),
    ],
)
def test_words_are_counted(caption, words):
    assert count_words(caption) == words


@pytest.mark.parametrize(
    ("captions", "settings", "expected"),
    [
        (["a cat"], {"min_words": 3}, "min_words"),
        (["a black cat"], {"min_words": 3}, None),
        (["cat", "IMG_2031", "a black cat"], {"min_words": 3, "boilerplate": True}, None),
        # the filter that drops the last caption
        (["IMG_2031", "cat"], {"min_words": 2, "boilerplate": True}, "min_words"),
        (["IMG_2031", "photo of 3 May 2009"], {"min_words": 2, "boilerplate": True}, "boilerplate"),
        ([], {"min_words": 3, "boilerplate": True}, None),  # a sample without captions is another matter
    ],
)
def test_filters_of_captions(captions, settings, expected):
    filters = Filters(replace(OFF, **settings))
    assert filters.reason(captions, 9, 9) == expected
    if captions:
        assert bool(filters.captions(captions)) == (expected is None)


def test_names_of_the_exclude_list_are_dropped(tmp_path):
    (tmp_path / "drop.txt").write_text("cats/1.png\nhündin.png\n", encoding="utf-8")
    names = ("hündin.png", "cats/2.png", None)
    reasons = [reason(["a"], name=name, exclude_list=tmp_path / "drop.txt") for name in names]
    assert reasons == ["exclude_list", None, None]
    others = ["caf\udce9.png", "a\rb.png", "a\nb.png", "b.png"]
    for data, found in (
        (b"caf\xe9.png\r\na\rb.png\n", others[:2]),
        (b"a\nb.png\0caf\xe9.png\0", others[::2]),
    ):
        (tmp_path / "drop.txt").write_bytes(data)
        dropped = Filters(FilterConfig(exclude_list=tmp_path / "drop.txt"))
        assert {name for name in others if dropped.reason(["a"], 30, 20, name)} == {*found[:2]}
    (tmp_path / "drop.txt").write_text("a.png", encoding="utf-16")
    with pytest.raises(ValueError, match=r"drop\.txt is UTF-16"):
        Filters(FilterConfig(exclude_list=tmp_path / "drop.txt"))
    with pytest.raises(ValueError, match=r"cannot read the exclude list .*nowhere.*a text file"):
        Filters(FilterConfig(exclude_list=tmp_path / "nowhere"))


SENTENCES = ["photographed on 3 May 2009", "Shot on Sat. 4 july '09", "scanned 1 jan 1999 by the camera"]
DATES = ["03.05.09", "3-May-09, 2:15 pm", "Sunday, May 3rd 2009", "december 12", "the 3rd of May, 2009"]
FILES = ["Photo taken 2009-05-03 14:32:05", "IMG_20090503_143205.jpg", "20090503_143205", "DSC_0123"]


@pytest.mark.parametrize("caption", [*SENTENCES, *DATES, *FILES])
def test_boilerplate(caption):
    assert is_boilerplate(caption)
    assert reason([caption], boilerplate=True) == "boilerplate"


WITH_DATES = ["a cat photographed on 3 May 2009", "fireworks, 4 July 2009", "calendar of May 2009"]
WORDS = ["photo", "image of the sun", "2009", "may", "12", "9:41", "f-16", "1.2.3.4", "августа 2009", ""]


@pytest.mark.parametrize("caption", [*WITH_DATES, *WORDS])
def test_other_captions_are_no_boilerplate(caption):
    assert not is_boilerplate(caption)


@pytest.mark.parametrize("caption", ["1" * 20000, "may " * 5000, "1.1." * 5000, "on " * 7000 + "1 may"])
def test_long_captions_take_linear_time(caption):
    is_boilerplate(caption)
    count_words(caption)


ENGLISH = ["two dogs playing in the snow", "cat", "a bowl of fresh fruit on a wooden table", "?!", ""]
GERMAN = "zwei Hunde spielen im Schnee vor dem Haus"
OTHERS = [GERMAN, "deux chiens jouent dans la neige", "две собаки играют в снегу", "两只狗在雪地里玩耍"]


def test_the_language():
    pytest.importorskip("py3langid")
    english, german = (Filters(replace(OFF, language=code)) for code in ("en", "de"))
    assert {english.reason([caption], 9, 9) for caption in ENGLISH} == {None}
    assert {english.reason([caption], 9, 9) for caption in OTHERS} == {"language"}
    assert [german.reason([caption], 9, 9) for caption in (GERMAN, ENGLISH[0])] == [None, "language"]
    with pytest.raises(ValueError, match=r"language 'xx'; expected one of .*, en, "):
        Filters(replace(OFF, language="xx"))


def test_a_missing_detector_is_named(monkeypatch):
    language_detector.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ImportError, match="needs py3langid: pip install"):
        Filters(replace(OFF, language="en"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio must be at least 1"),
        ({"max_aspect_ratio": float("nan")}, "max_aspect_ratio"),
        ({"min_words": -1}, "min_words must be 0"),
        ({"min_size": -1}, "min_size must be 0"),
        ({"language": "English"}, "language must be a code such as en"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        FilterConfig(**settings)


def test_one_by_one_has_the_active_filters(tmp_path):
    (tmp_path / "drop").touch()
    config = FilterConfig(True, 2.0, 3, None, 64, tmp_path / "drop")
    alone = one_by_one(config)
    assert list(alone) == ["boilerplate", "max_aspect_ratio", "min_words", "min_size", "exclude_list"]
    assert alone["min_words"] == replace(OFF, min_words=3)
    assert one_by_one(OFF) == {}
    again = pickle.loads(pickle.dumps(Filters(alone["min_words"])))  # for the workers
    assert again.reason(["cat"], 9, 9) == "min_words"

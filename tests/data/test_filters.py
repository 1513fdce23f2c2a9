"""Filters of paper section 2.3: dalle/data/filters.py."""

import pickle
from dataclasses import replace

import pytest

from dalle.data.config import PAPER_FILTERS, FilterConfig
from dalle.data.filters import Filters, count_words, is_boilerplate, one_by_one

OFF = FilterConfig(boilerplate=False, max_aspect_ratio=None)


def reason(captions, width=300, height=300, name=None, base=OFF, **settings):
    return Filters(replace(base, **settings)).reason(captions, width, height, name)


# By default.


@pytest.mark.parametrize("caption", ["cat", "a cat", "chat noir", "猫", "x", "may", "2001", "12 monkeys"])
def test_a_users_small_captions_stay(caption):
    filters = Filters(FilterConfig())
    assert filters.reason([caption], 30, 20) is None
    assert filters.captions([caption]) == [caption]


def test_by_default_boilerplate_and_long_images_go():
    assert Filters(FilterConfig()).reason(["photographed on 3 May 2009"], 300, 300) == "boilerplate"
    assert Filters(FilterConfig()).reason(["a train"], 601, 300) == "aspect"


def test_every_filter_can_be_off():
    assert reason(["photographed on 3 May 2009"], 9000, 1) is None
    assert Filters(OFF).captions(["", "IMG_2031"]) == ["", "IMG_2031"]


# One filter after the other.


@pytest.mark.parametrize(
    ("width", "height", "dropped"),
    [
        (200, 100, False),
        (100, 200, False),
        (201, 100, True),
        (100, 201, True),
        (100, 100, False),
        (1000, 1, True),
    ],
)
def test_aspect_keeps_from_half_to_two(width, height, dropped):
    assert reason(["a"], width, height, max_aspect_ratio=2.0) == ("aspect" if dropped else None)


@pytest.mark.parametrize(("width", "height", "dropped"), [(64, 64, False), (63, 500, True), (500, 63, True)])
def test_small_is_by_the_shorter_side(width, height, dropped):
    assert reason(["a"], width, height, min_size=64) == ("too small" if dropped else None)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("", 0),
        ("cat", 1),
        ("the dog's bowl", 3),
        ("a red-and-white cap!", 5),
        ("3 dogs", 2),
        ("- ... -", 0),
        ("\u2019tis n\u00f6", 2),
        ("两只狗在雪地里", 7),
        ("雪の中", 3),
        ("Кошка на диване", 3),
        ("snake_case", 2),
    ],
)
def test_words_are_counted(caption, words):
    assert count_words(caption) == words


def test_captions_of_too_few_words_go():
    assert reason(["a cat"], min_words=3) == "too short"
    assert reason(["a black cat"], min_words=3) is None


def test_a_sample_stays_while_one_caption_does():
    captions = ["cat", "IMG_2031", "a black cat"]
    filters = Filters(FilterConfig(min_words=2))
    assert filters.reason(captions, 10, 10) is None
    assert filters.captions(captions) == ["a black cat"]


def test_the_filter_that_leaves_no_caption_gives_the_reason():
    assert reason(["IMG_2031", "cat"], min_words=2, boilerplate=True) == "too short"
    assert reason(["IMG_2031", "photo of 3 May 2009"], min_words=2, boilerplate=True) == "boilerplate"


def test_captions_and_reason_agree():
    filters = Filters(FilterConfig(min_words=2))
    for captions in (["cat", "IMG_2031"], ["a cat", "cat"], ["photo 3.5.2009"], ["two cats"]):
        assert (filters.reason(captions, 9, 9) is None) == bool(filters.captions(captions))


def test_a_image_without_captions_is_not_a_matter_of_caption_filters():
    assert reason([], min_words=3, boilerplate=True) is None


def test_names_of_a_list_go(tmp_path):
    (tmp_path / "drop.txt").write_text("cats/1.png\nhündin.png\n", encoding="utf-8")
    settings = {"exclude_list": tmp_path / "drop.txt"}
    assert reason(["a"], name="hündin.png", **settings) == "exclude list"
    assert reason(["a"], name="cats/2.png", **settings) is None
    assert reason(["a"], **settings) is None


# Boilerplate.


@pytest.mark.parametrize(
    "caption",
    [
        "photographed on 3 May 2009",
        "Photographed on May 3, 2009.",
        "Photograph taken on the 3rd of May, 2009",
        "Photo taken 2009-05-03 14:32:05",
        "image from 03/05/2009",
        "03.05.09",
        "3-May-09, 2:15 pm",
        "Sunday, May 3rd 2009",
        "Sept. 2009",
        "december 12",
        "12 December",
        "IMG_20090503_143205.jpg",
        "20090503_143205",
        "DSC_0123",
        "DSCN1234.JPG",
        "P1010023",
        "Image uploaded on 2009/05/03 at 08:15",
        "scanned 1 jan 1999 by the camera",
        "Shot on Sat. 4 july '09",
    ],
)
def test_boilerplate_is_told(caption):
    assert is_boilerplate(caption)
    assert reason([caption], boilerplate=True) == "boilerplate"


@pytest.mark.parametrize(
    "caption",
    [
        "a cat photographed on 3 May 2009",
        "fireworks, 4 July 2009",
        "photo",
        "a photo",
        "image of the sun",
        "2009",
        "may",
        "a march",
        "12",
        "3.5",
        "12/5",
        "9:41",
        "the shot",
        "calendar of May 2009",
        "boeing 747",
        "room 101, 12.05",
        "p3",
        "f-16",
        "version 1.2.3.4",
        "августа 2009",
        "写真 2009-05-03",
        "",
    ],
)
def test_what_says_something_is_no_boilerplate(caption):
    assert not is_boilerplate(caption)


@pytest.mark.parametrize("caption", ["1" * 20000, "may " * 5000, "1.1." * 5000, "on " * 7000 + "1 may"])
def test_endless_captions_do_no_harm(caption):
    is_boilerplate(caption)  # no pattern may take more than linear time
    count_words(caption)


# Language.


@pytest.fixture
def english():
    pytest.importorskip("py3langid")
    return Filters(replace(OFF, language="en"))


@pytest.mark.parametrize(
    "caption",
    [
        "two dogs playing in the snow",
        "cat",
        "pizza",
        "a bowl of fresh fruit on a wooden table",
        "a neon sign",
        "?!",
        "",
    ],
)
def test_english_stays(english, caption):
    assert english.reason([caption], 9, 9) is None


@pytest.mark.parametrize(
    "caption",
    [
        "zwei Hunde spielen im Schnee vor dem Haus",
        "deux chiens jouent dans la neige",
        "две собаки играют в снегу",
        "两只狗在雪地里玩耍",
        "kalbin üzerinde oturan küçük bir kedi",
    ],
)
def test_other_languages_go(english, caption):
    assert english.reason([caption], 9, 9) == "language"


def test_another_language_than_english_can_be_kept():
    pytest.importorskip("py3langid")
    german = Filters(replace(OFF, language="de"))
    assert german.reason(["zwei Hunde spielen im Schnee vor dem Haus"], 9, 9) is None
    assert german.reason(["two dogs playing in the snow"], 9, 9) == "language"


def test_an_unknown_language_is_told():
    pytest.importorskip("py3langid")
    with pytest.raises(ValueError, match=r"language 'xx'; expected one of .*, en, "):
        Filters(replace(OFF, language="xx"))


def test_a_missing_detector_is_told(monkeypatch):
    from dalle.data.filters import language_detector

    language_detector.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "py3langid", None)
    with pytest.raises(ImportError, match="needs py3langid: pip install"):
        Filters(replace(OFF, language="en"))
    assert Filters(OFF).reason(["eine Katze"], 9, 9) is None


# Configurations.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio is longer side / shorter side, so at least 1"),
        ({"max_aspect_ratio": float("nan")}, "max_aspect_ratio"),
        ({"min_words": -1}, "min_words must be 0"),
        ({"min_size": -1}, "min_size must be 0"),
        ({"language": "English"}, "language must be a code such as en"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        FilterConfig(**settings)


def test_a_drop_list_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the exclude list .*nowhere.*a text file"):
        Filters(FilterConfig(exclude_list=tmp_path / "nowhere"))


def test_the_filters_one_by_one_cover_those_that_are_on(tmp_path):
    (tmp_path / "drop").touch()
    config = FilterConfig(True, 2.0, 3, None, 64, tmp_path / "drop")
    alone = one_by_one(config)
    assert list(alone) == ["boilerplate", "aspect", "too short", "too small", "exclude list"]
    assert alone["too short"] == replace(OFF, min_words=3)
    assert one_by_one(OFF) == {}


def test_each_filter_alone_gives_its_own_name_as_the_reason():
    samples = {"boilerplate": (["IMG_0001"], 9, 9), "aspect": (["a"], 9, 1), "too short": (["a"], 9, 9)}
    for name, config in one_by_one(replace(PAPER_FILTERS, language=None)).items():
        assert Filters(config).reason(*samples[name]) == name


def test_filters_go_to_another_process():
    again = pickle.loads(pickle.dumps(Filters(FilterConfig(min_words=2))))
    assert again.reason(["cat"], 9, 9) == "too short"

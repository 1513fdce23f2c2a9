"""The report's page: exact images and settings, escaped text, thinned curves."""

import math
from types import SimpleNamespace

from PIL import Image

from dalle.commands.train_diffusion import TrainDiffusionArgs
from dalle.config import to_dict
from dalle.report.page import Table, Text, curve_figure, image_figure, render
from dalle.report.sections import configuration, images_over_time, pairs, settings
from tests.commands.test_report import HOSTILE, Page, decode


def test_small_images_and_settings_are_exact():
    image = decode(image_figure(Image.new("RGB", (40, 30), (1, 2, 255)), "blue").source)
    assert (image.size, image.convert("RGB").getpixel((5, 5))) == ((40, 30), (1, 2, 255))
    data = {"a": {"lr": 1.25e-6, "on": True}, "b": [1, 0.1234567], "c": None, "d": "red"}
    expected = {"a.lr": "1.25e-06", "a.on": "true", "b": "[1, 0.1234567]", "c": "null", "d": "red"}
    assert settings(data) == expected


def test_every_text_is_escaped():
    items = [Text(HOSTILE), Table([[HOSTILE]], [HOSTILE])]
    page = Page(render(HOSTILE, HOSTILE, {HOSTILE: items}, [HOSTILE]))
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert page.text.count(HOSTILE[:-1]) == 9


def test_long_curves_are_thinned_and_need_a_finite_point():
    lines = [{"step": i, "loss": i % 2} for i in range(10_000)]
    assert len(curve_figure("loss", "loss", lines).source) < 100_000
    assert curve_figure("a", "loss", [{"step": 1, "loss": math.nan, "baseline/loss": 2.0}]) is None


def test_pairs_that_training_never_shows_are_in_brackets():
    table = {"red": {"square": 1.0, "circle": 0.25}, "blue": {"circle": 0.5}}
    context = SimpleNamespace(evaluations={"a.json": {"pair_accuracy": table}, "b.json": {}})
    _, found = pairs(context)
    assert found.head == ("", "circle", "square")
    assert found.rows == [("red", "[0.25]", "1.00"), ("blue", "0.50", "[]")]


def test_a_run_of_a_diffusion_model_has_its_settings_and_samples(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "samples-00000002.png")
    meta = {"config": to_dict(TrainDiffusionArgs(steps=7))}
    context = SimpleNamespace(runs={"base": SimpleNamespace(folder=tmp_path, meta=meta)})
    _, changed, _ = configuration(context)
    assert changed.rows == [("steps", "7", "2500000")]
    assert [figure.caption for figure in images_over_time(context)] == ["base: samples-00000002"]

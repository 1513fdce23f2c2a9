"""The work of the web page, without the page (dalle/app/jobs.py), and how it starts (app.py)."""

import json
import sys
import zipfile
from pathlib import Path
from threading import Event

import pytest
import torch
from PIL import Image

from dalle.app.jobs import (
    Limits,
    Request,
    Work,
    ended,
    kept_part,
    label,
    number,
    open_upload,
    standing,
    write_zip,
)
from dalle.commands.app import AppArgs, app
from dalle.commands.sample import SampleArgs, sample
from dalle.pipelines.dalle import DALLE

LIMITS = Limits()


@pytest.fixture(scope="module")
def model(chain) -> DALLE:
    return DALLE.from_pretrained(chain / "model")


@pytest.fixture
def image(tmp_path) -> Path:
    """A file of 60 x 40 pixels, red above green."""
    image = Image.new("RGB", (60, 40), "green")
    image.paste("red", (0, 0, 60, 20))
    image.save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def request(prompt: str, **changes) -> Request:
    return Request(**{"caption": prompt, "seed": 3, "n": 2, "best_of": 5} | changes)


class TestWork:
    def test_the_defaults_are_those_of_sample_py(self):
        plain, ours = SampleArgs(), Request()
        assert (ours.n, ours.best_of) == (plain.num_images, plain.best_of)
        assert ours.sampling == {name: getattr(plain.sampling, name) for name in ours.sampling}

    def test_it_draws_what_generate_draws(self, model, prompt):
        asked = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "guidance": 2.0}
        work = Work(model, request(prompt, **asked), LIMITS)
        steps = list(work.steps(Event()))
        whole = model.generate(prompt, n=2, best_of=5, seed=3, progress=False, **asked)
        assert torch.equal(work.generation.image_tokens, whole.image_tokens)
        assert work.generation.scores == whole.scores
        assert len(steps) == 4 + 1  # rows, and the block

    def test_it_completes_what_complete_completes(self, model, prompt, image):
        work = Work(model, request(prompt, image=image, rows=1), LIMITS)
        list(work.steps(Event()))
        whole = model.complete(prompt, image, rows=1, n=2, best_of=5, seed=3, progress=False)
        assert torch.equal(work.generation.image_tokens, whole.image_tokens)

    def test_a_blank_seed_is_made_up_and_shown(self, model, prompt):
        seeds = {Work(model, request(prompt, seed=None), LIMITS).seed for _ in range(4)}
        assert len(seeds) == 4
        work = Work(model, request(prompt, seed=None, best_of=2), LIMITS)
        list(work.steps(Event()))
        assert f"Seed {work.seed}," in ended(work.generation, 1.0)

    def test_stopped_it_draws_no_further_row(self, model, prompt, slots_drawn):
        work, stop = Work(model, request(prompt, best_of=40), LIMITS), Event()
        for i, _ in enumerate(work.steps(stop)):
            if i == 6:  # second row of the second block
                stop.set()
        assert len(slots_drawn) == 16 + 8
        assert (work.generation.num_generated, work.generation.interrupted) == (16, True)
        assert ended(work.generation, 1.0).startswith(
            "Stopped after 16 of 40 candidates. 2 images, the best of 16."
        )

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"caption": ""}, "the prompt is empty"),
            ({"caption": " \n "}, "the prompt is empty"),
            ({"caption": "a" * 1001}, "the caption has 1,001 letters, at most 1,000 are read"),
            ({"caption": "a red cross and " * 30}, r"the caption has \d+ tokens, the layout has room for 19"),
            ({"n": 0}, "images must be 1 to 16 here, got 0"),
            ({"n": None}, "the field of images is blank; give a number from 1 to 16"),
            ({"n": 17, "best_of": 20}, "images must be 1 to 16 here, got 17"),
            ({"best_of": 513}, "best of must be 1 to 512 here, got 513"),
            ({"best_of": 1}, "best of must be at least as many as the images, got 1 for 2"),
            ({"temperature": -1}, "temperature must be 0"),
            ({"temperature": float("nan")}, "temperature must be 0"),
            ({"temperature": None}, "temperature is blank"),
            ({"top_k": 0}, "top_k must be at least 1"),
            ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
            ({"guidance": float("inf")}, "guidance must be finite"),
            ({"seed": -1}, "the seed must be 0 to"),
            ({"seed": 2**60}, "leave it blank for a new one"),
            ({"rows": 0}, "rows must be 1 to 3"),
            ({"rows": 4}, "rows must be 1 to 3"),
        ],
    )
    def test_what_cannot_be_drawn_is_told_before_anything_is_drawn(self, model, prompt, image, changes, said):
        image = image if "rows" in changes else None
        with pytest.raises(ValueError, match=said):
            Work(model, request(prompt, image=image, **changes), LIMITS)

    def test_letters_that_the_vocabulary_lacks_are_a_warning(self, model):
        assert ["lacks letters of '円'" in one for one in Work(model, request("円"), LIMITS).warnings] == [
            True
        ]

    def test_without_a_scorer_what_is_asked_for_is_drawn_unranked(self, model, prompt):
        plain = DALLE(model.dvae, model.transformer, model.text)
        work = Work(plain, request(prompt, best_of=64), LIMITS)
        list(work.steps(Event()))
        assert (work.generation.num_generated, work.warnings) == (2, [])
        assert label(work.generation, 1) == "candidate 1"
        assert "2 images, unranked" in ended(work.generation, 1.0)

    def test_how_far_it_is_and_the_scores_are_told(self, model, prompt):
        work = Work(model, request(prompt, best_of=20), LIMITS)
        told = [standing(step, 4, 4) for step in work.steps(Event())]
        assert told[1] == "Drawing candidates 1 to 16 of 20: row 2 of 4"
        assert told[-1] == "Drawing candidates 17 to 20 of 20: row 4 of 4"
        assert label(work.generation, 0) == f"1: score {work.generation.scores[0]:.3f}"

    @pytest.mark.parametrize(
        ("text", "kind", "value"), [("", int, None), (None, int, None), (" 7 ", int, 7), ("0.5", float, 0.5)]
    )
    def test_a_field_may_be_blank(self, text, kind, value):
        assert number("seed", text, kind) == value

    def test_a_field_that_is_no_number_is_told(self):
        with pytest.raises(ValueError, match=r"seed must be a whole number, or blank; got '1.5'"):
            number("seed", "1.5", int)


class TestUploads:
    def test_the_kept_part_is_shown(self, model, image):
        shown = kept_part(open_upload(image, LIMITS), 1, model)
        assert shown.size == (32, 32)
        assert {shown.getpixel((5, y)) for y in range(8)} == {(255, 0, 0)}
        assert {shown.getpixel((5, y)) for y in range(8, 32)} == {(128, 128, 128)}

    @pytest.mark.parametrize(
        ("content", "limits", "said"),
        [
            (b"no image", LIMITS, "^cat.png: wrong type"),
            (b"", LIMITS, "^cat.png: truncated"),
            (b"\x89PNG\r\n\x1a\n broken", LIMITS, "^cat.png: "),
            (None, Limits(upload=50), "^cat.png has 0.0 MiB; expected at most 0"),
            (None, Limits(pixels=2399), "^cat.png has 60 x 40 pixels; expected at most 2,399 in all"),
        ],
    )
    def test_what_is_no_image_or_too_large_is_told_without_the_servers_paths(
        self, image, content, limits, said
    ):
        if content is not None:
            image.write_bytes(content)
        with pytest.raises(ValueError, match=said) as found:
            open_upload(image, limits)
        assert str(image.parent) not in str(found.value)


class TestZip:
    def test_it_holds_what_sample_py_writes(self, model, chain, prompt, tmp_path):
        work = Work(model, request(prompt), LIMITS)
        list(work.steps(Event()))
        path = write_zip(tmp_path, model, work.generation, work.options({"precision": "fp32"}))
        assert path.name == "a-red-cross-above-a-blue-circle-on-a-white-background-3.zip"
        assert list(tmp_path.iterdir()) == [path]
        run = SampleArgs(
            prompt,
            model=chain / "model",
            best_of=5,
            num_images=2,
            seed=3,
            device="cpu",
            precision="fp32",
            out=tmp_path / "out",
        )
        sample(run)
        with zipfile.ZipFile(path) as archive:
            ours = {name: archive.read(name) for name in archive.namelist()}
        theirs = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        assert ours.keys() == theirs.keys() == {"00.png", "01.png", "grid.png", "sample.json"}
        told, expected = (json.loads(files.pop("sample.json")) for files in (ours, theirs))
        assert ours == theirs
        assert {key: expected[key] for key in told} == told
        assert {
            "prompt",
            "seed",
            "n",
            "best_of",
            "temperature",
            "top_k",
            "top_p",
            "guidance",
            "batch_size",
            "precision",
            "model",
            "images",
        } == told.keys()
        assert told["model"] == model.hash

    def test_a_completion_names_its_image_without_the_servers_folders(self, model, prompt, image):
        work = Work(model, request(prompt, image=image, rows=2), LIMITS)
        list(work.steps(Event()))
        assert work.options({})["image"] == "cat.png"
        assert work.options({})["rows"] == 2


class TestStart:
    def test_without_gradio_it_says_how_to_come_by_it(self, chain, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        with pytest.raises(ImportError, match=r"needs gradio: pip install 'zeroshot-text2image\[app\]'"):
            app(AppArgs(chain / "model"))

    def test_without_a_model_it_says_so_also_without_gradio(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        with pytest.raises(
            ValueError, match=r"say which model: python scripts/app\.py runs/quickstart/model"
        ):
            app(AppArgs())
        for path in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(ValueError, match="is no model directory"):
                app(AppArgs(path))

    def test_it_listens_to_this_computer_alone_and_shares_nothing_unless_asked(self):
        assert (AppArgs().host, AppArgs().share) == ("127.0.0.1", False)

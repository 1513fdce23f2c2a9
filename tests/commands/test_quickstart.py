"""The quick start: its results, and how it resumes."""

from pathlib import Path

import pytest
from PIL import Image

from dalle.commands.quickstart import QuickstartArgs
from dalle.io.files import read_json
from dalle.pipelines.dalle import DALLE
from dalle.train import trainer as loop


@pytest.fixture
def words(tiny_configs, few_captions) -> list:
    return ["--configs", tiny_configs, "--captions", "2", "--device", "cpu", "--out", "quick"]


def test_it_writes_images_a_report_and_a_model(script, words, tmp_path, prompt):
    done = script("quickstart", *words)
    assert done.code == 0, done.err
    out = tmp_path / "quick"
    for name in ("samples.png", "reconstructions.png", "losses.png"):
        assert min(Image.open(out / name).size) > 30
    report = read_json(out / "report.json")
    scores = "real mismatched reconstruction first best_of_16 random_of_16 oracle_of_16 chance"
    scores = {f"acc_{name}" for name in scores.split()}
    assert report["caption_accuracy"].keys() == report["caption_accuracy_new_pairs"].keys() == scores
    stages = {"tokenizer", "dvae", "encode", "transformer", "clip", "sample", "total"}
    assert report["seconds"].keys() == stages
    assert report["codebook"].keys() == {"used", "perplexity"}
    assert report["caption_accuracy"]["acc_real"] == 1.0
    assert sum(len(shares) for shares in report["pair_accuracy"].values()) >= 3  # captions of two kinds
    assert "Pairs of color and shape" in (out / "report.html").read_text()
    assert (report["seed"], report["captions"], report["best_of"]) == (0, 2, 16)
    model = DALLE.from_pretrained(out / "model")
    assert model.hash == report["model"]
    accuracy = report["caption_accuracy"]["acc_best_of_16"]
    row = f"| caption_accuracy.acc_best_of_16 | {accuracy:.4g} |"
    assert row in (out / "model" / "README.md").read_text()
    assert f"--model {Path('quick/model')} --prompt" in done.out
    assert len(model.generate(prompt, n=1, best_of=2, progress=False).images) == 1


def test_a_finished_one_is_moved_aside(script, words, tmp_path):
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "report.html").write_text("")
    (tmp_path / "quick" / "precious.txt").write_text("mine")
    words[words.index("--configs") + 1] = tmp_path / "none"  # stops before training
    done = script("quickstart", *words)
    assert (tmp_path / "quick-1" / "precious.txt").read_text() == "mine"
    assert "moved to quick-1" in done.out


def test_an_interrupted_one_resumes(script, words, tmp_path, monkeypatch):
    """With the text tokenizer that the earlier stages were trained with."""
    train_step, calls = loop.train_step, []

    def power_cut(state, *rest):
        calls.append(state.step)
        if len(calls) == 4:  # the dVAE took two steps, the transformer one
            raise KeyboardInterrupt
        return train_step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", power_cut)
        done = script("quickstart", *words, "--best-of", "2")
    assert "the same command resumes" in done.err
    text = (tmp_path / "quick" / "text" / "text_tokenizer.json").read_bytes()
    done = script("quickstart", *words, "--best-of", "2")
    assert done.code == 0, done.err
    assert "dvae: resuming from step 2" in done.out
    assert (tmp_path / "quick" / "text" / "text_tokenizer.json").read_bytes() == text


@pytest.mark.parametrize("settings", [{"captions": 0}, {"best_of": -1}, {"temperature": -1.0}])
def test_numbers_out_of_range_are_refused_before_any_work(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be".replace("_", ".")):
        QuickstartArgs(**settings)

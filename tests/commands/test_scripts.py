"""The scripts: sampling, the quick start, missing stages, and mistakes answered in one line."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dalle import config as paths
from dalle.commands.quickstart import QuickstartArgs
from dalle.commands.train_tokenizer import train_tokenizer
from dalle.io.files import read_json
from dalle.pipelines.dalle import DALLE
from dalle.runs import inputs as runs
from dalle.runs import quickstart as stage
from dalle.train import trainer as loop
from dalle.train.checkpoint import latest_checkpoint

PROJECT = Path(__file__).parents[2]
CONFIGS = PROJECT / "configs"


class TestSample:
    @pytest.fixture
    def sample(self, script, chain, prompt):
        words = ["--model", chain / "model", "--prompt", prompt, "--device", "cpu"]
        return lambda *more: script("sample", *words, "--best-of", "2", "--num-images", "1", *more)

    def test_it_never_overwrites_another_sample(self, sample, tmp_path):
        for _ in range(3):
            assert sample().code == 0
        names = sorted(path.name for path in (tmp_path / "runs" / "samples").iterdir())
        assert [name.removeprefix(names[0]) for name in names] == ["", "-2", "-3"]
        assert sample("--out", "mine").code == 0
        before = (tmp_path / "mine" / "00.png").read_bytes()
        assert_refused(sample("--out", "mine", "--seed", "5"), "mine is not empty; give another --out")
        assert (tmp_path / "mine" / "00.png").read_bytes() == before

    def test_it_joins_the_runs(self, script, chain, prompt, tmp_path):
        for kind in ("dvae", "transformer", "clip"):
            shutil.copytree(chain / kind, tmp_path / "runs" / kind)
        words = ["--prompt", prompt, "--best-of", "4", "--num-images", "2", "--device", "cpu"]
        done = script("sample", *words)
        assert done.code == 0, done.err
        (folder,) = (tmp_path / "runs" / "samples").iterdir()
        files = {"00.png", "01.png", "grid.png", "sample.json"}
        assert {path.name for path in folder.iterdir()} == files
        assert Image.open(folder / "00.png").size == (32, 32)
        record = read_json(folder / "sample.json")
        assert (record["prompt"], record["best_of"], len(record["images"])) == (prompt, 4, 2)
        assert record["images"][0]["score"] >= record["images"][1]["score"]

    def test_a_failed_sample_leaves_no_directory(self, sample, prompt, tmp_path):
        assert sample("--prompt", " and ".join([prompt] * 5)).code == 1
        assert not (tmp_path / "runs").exists()

    def test_the_json_reproduces_the_images(self, sample, chain, tmp_path):
        sample("--out", "mine", "--seed", "3", "--temperature", "0.7", "--top-k", "5")
        record = read_json(tmp_path / "mine" / "sample.json")
        model = DALLE.from_pretrained(chain / "model")
        assert record.pop("model") == model.hash
        (image,) = record.pop("images")
        again = model.to_precision(record.pop("precision")).generate(record.pop("prompt"), **record)
        assert again.candidates == [image["candidate"]]
        assert again.images[0].tobytes() == Image.open(tmp_path / "mine" / image["file"]).tobytes()

    def test_it_completes_an_image(self, sample, tmp_path):
        half = tmp_path / "half.png"
        Image.new("RGB", (40, 40), "red").save(half)
        assert sample("--init-image", half, "--out", "mine").code == 0
        assert read_json(tmp_path / "mine" / "sample.json")["rows"] == 2
        assert_refused(sample("--init-image", half, "--keep-rows", "0"), "rows must be 1 to 3, got 0")

    def test_it_writes_the_joined_parts_as_a_model_directory(self, sample, chain, tmp_path):
        assert sample("--save-pretrained", "joined").code == 0
        assert DALLE.from_pretrained(tmp_path / "joined").hash == DALLE.from_pretrained(chain / "model").hash
        assert "None is given" in (tmp_path / "joined" / "README.md").read_text()


@pytest.fixture
def few_captions(monkeypatch):
    """The text tokenizer learns from a few captions, not from a hundred thousand."""
    monkeypatch.setattr(stage, "train_tokenizer", lambda run: train_tokenizer(replace(run, captions=2000)))


class TestQuickstart:
    @pytest.fixture
    def words(self, tiny_configs, few_captions) -> list:
        return ["--configs", tiny_configs, "--captions", "2", "--device", "cpu", "--out", "quick"]

    def test_it_writes_images_a_report_and_a_model(self, script, words, tmp_path, prompt):
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
        assert (report["seed"], report["captions"], report["best_of"]) == (0, 2, 16)
        model = DALLE.from_pretrained(out / "model")
        assert model.hash == report["model"]
        accuracy = report["caption_accuracy"]["acc_best_of_16"]
        row = f"| caption_accuracy.acc_best_of_16 | {accuracy:.4g} |"
        assert row in (out / "model" / "README.md").read_text()
        assert f"--model {Path('quick/model')} --prompt" in done.out
        assert len(model.generate(prompt, n=1, best_of=2, progress=False).images) == 1

    def test_a_finished_one_is_moved_aside(self, script, words, tmp_path):
        (tmp_path / "quick").mkdir()
        (tmp_path / "quick" / "report.html").write_text("")
        (tmp_path / "quick" / "precious.txt").write_text("mine")
        words[words.index("--configs") + 1] = tmp_path / "none"  # stops before training
        done = script("quickstart", *words)
        assert (tmp_path / "quick-1" / "precious.txt").read_text() == "mine"
        assert "moved to quick-1" in done.out

    def test_an_interrupted_one_resumes(self, script, words, tmp_path, monkeypatch):
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


class TestNoArguments:
    @pytest.fixture
    def tiny(self, tiny_configs, few_captions, monkeypatch):
        monkeypatch.setattr(paths, "CONFIGS", tiny_configs)
        monkeypatch.setattr(stage, "CONFIGS", tiny_configs)

    @pytest.mark.parametrize("missing", [["text", "dvae", "tokens"], []])
    def test_the_transformer_makes_the_stages_it_lacks(self, script, tiny, chain, tmp_path, missing):
        for name in {"text", "tokens", "dvae"}.difference(missing):
            shutil.copytree(chain / name, tmp_path / "runs" / name)
        done = script("train_transformer")
        assert done.code == 0, done.err
        assert "no arguments: using --config" in done.out
        made = [line for line in done.out.splitlines() if "training or encoding first" in line]
        assert [line.split()[1] for line in made] == missing
        assert f"tokens from {Path('runs/tokens')}" in done.out
        assert latest_checkpoint(tmp_path / "runs" / "transformer").name == "step-00000002"

    def test_the_dvae_takes_its_preset(self, script, tiny, tmp_path):
        done = script("train_dvae")
        assert done.code == 0, done.err
        assert "no arguments: using --config" in done.out
        assert list((tmp_path / "runs" / "dvae").glob("reconstructions-*.png"))


TINY_DVAE = ("--config", CONFIGS / "dvae" / "shapes.yaml")
TINY_TEXT = ("--config", CONFIGS / "transformer" / "shapes.yaml")
TINY_CLIP = ("--config", CONFIGS / "clip" / "shapes.yaml")
PROMPT = ("--prompt", "a red circle in the middle")


def assert_refused(done: SimpleNamespace, message: str) -> None:
    """Exit status 1 and one line; a second line is a command, if any."""
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    commands = done.err.strip().splitlines()[1:]
    assert all(line.startswith("    python scripts/") for line in commands)
    assert re.search(message, done.err), done.err


class TestMissingStages:
    @pytest.mark.parametrize(
        ("name", "words", "option", "kind"),
        [
            ("encode_images", TINY_DVAE, "--dvae", "dvae"),
            ("train_transformer", TINY_TEXT, "--text-tokenizer", "text"),
            ("train_clip", TINY_CLIP, "--text-tokenizer", "text"),
            ("sample", PROMPT, "--dvae", "dvae"),
        ],
    )
    def test_the_command_that_makes_it_is_named(self, script, name, words, option, kind):
        done = script(name, *words)
        assert_refused(done, rf"no {kind} under runs/")
        command = done.err.splitlines()[1].strip()
        assert command == runs.MAKE_COMMANDS[kind]
        assert (PROJECT / command.split()[1]).is_file()
        assert (PROJECT / command.split()[3]).is_file()
        assert_refused(script(name, *words, option, "nowhere"), f"no {kind} at nowhere")

    @pytest.mark.parametrize(
        ("found", "missing"), [("text", "tokens"), ("dvae", "transformer"), ("transformer", "clip")]
    )
    def test_the_next_one_missing_is_named(self, script, chain, tmp_path, found, missing):
        order = ["text", "tokens"] if missing == "tokens" else ["dvae", "transformer", "clip"]
        for stage_name in order[: order.index(found) + 1]:
            shutil.copytree(chain / stage_name, tmp_path / "runs" / stage_name)
        name, words = ("train_transformer", TINY_TEXT) if missing == "tokens" else ("sample", PROMPT)
        assert_refused(script(name, *words), f"no {missing} under runs/")

    def test_the_newest_of_several_is_taken(self, chain, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for i, name in enumerate(["a", "quick/b", "c"]):
            shutil.copytree(chain / "dvae", tmp_path / "runs" / name)
            pointer = tmp_path / "runs" / name / "checkpoints" / "latest"
            os.utime(pointer, (1000 + i % 2, 1000 + i % 2))
        assert runs.latest_run("dvae") == Path("runs/quick/b")

    def test_unfinished_training_is_noted(self, chain, change_meta, tmp_path, capsys):
        shutil.copytree(chain / "dvae", tmp_path / "dvae")
        change_meta(latest_checkpoint(tmp_path / "dvae"), steps=100)
        runs.load_stage("dvae", tmp_path / "dvae")
        assert "2 of 100 steps only" in capsys.readouterr().out


class TestMistakes:
    @pytest.mark.parametrize("settings", [{"captions": 0}, {"best_of": -1}, {"temperature": -1.0}])
    def test_numbers_out_of_range_are_refused_before_any_work(self, settings):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be".replace("_", ".")):
            QuickstartArgs(**settings)

    @pytest.mark.parametrize(
        ("name", "words", "message"),
        [
            ("train_dvae", ("--seed", "1"), "--data.path"),
            ("train_dvae", ("--data.path", "nowhere"), "nowhere; give a folder"),
            ("train_dvae", ("--config", "nowhere.yaml"), r"no configuration file nowhere\.yaml"),
            ("train_dvae", (*TINY_DVAE, "--device", "gpu"), "unknown device 'gpu'"),
            (
                "train_tokenizer",
                ("--data.path", "shapes", "--captions", "9", "--text.vocab-size", "200"),
                "too small",
            ),
            ("train_clip", (*TINY_CLIP, "--text-tokenizer", "."), r"cannot read .*text_tokenizer\.json"),
            ("sample", (), "give --prompt"),
            ("sample", (*PROMPT, "--best-of", "2", "--num-images", "3"), "best-of must"),
            ("sample", (*PROMPT, "--model", "nowhere"), "nowhere is no model directory"),
            ("sample", (*PROMPT, "--model", "a", "--dvae", "b"), "leave out --dvae"),
            ("sample", (*PROMPT, "--keep-rows", "2"), "--keep-rows needs --init-image"),
            ("sample", (*PROMPT, "--prompts-file", "a", "--out", "b"), "--prompts-file replaces --prompt"),
            ("sample", ("--prompts-file", "a"), "--prompts-file needs --out"),
            ("sample", ("--prompts-file", "a", "--out", "b", "--init-image", "c"), "--init-image needs"),
            ("sample", (*PROMPT, "--temperature", "-1"), "temperature must be 0"),
            ("evaluate", ("--model", "nowhere"), "nowhere is no model directory"),
            ("quickstart", ("--configs", "nowhere"), "no configuration file"),
        ],
    )
    def test_they_are_answered_in_one_line(self, script, name, words, message):
        assert_refused(script(name, *words), message)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_device_that_is_not_there_is_named(self, script):
        assert_refused(script("train_dvae", *TINY_DVAE, "--device", "cuda"), "no cuda")

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("train_tokenizer", ("--data.path", "shapes", "--out", "file/run")),
            ("train_dvae", (*TINY_DVAE, "--out", "file/run", "--device", "cpu")),
            ("encode_images", (*TINY_DVAE, "--out", "file/run")),
            ("sample", (*PROMPT, "--out", "file")),
            ("evaluate", ("--json", "file/report.json")),
            ("quickstart", ("--out", "file")),
        ],
    )
    def test_an_output_that_cannot_be_written_is_named_before_any_work(self, script, tmp_path, name, words):
        (tmp_path / "file").write_text("in the way")
        assert_refused(script(name, *words), "cannot write to file")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--model.grid", "5", "5"), r"\[4, 4\], model\.grid is \[5, 5\]"),
            (("--model.image-vocab", "8"), r"16 codes, model\.image_vocab is 8"),
            (("--model.text-vocab", "300"), r"\d+ ids, model\.text_vocab is 300"),
            (("--eval-samples", "24"), "24 images, eval_samples takes 24"),
        ],
    )
    def test_inputs_that_do_not_fit_the_transformer_are_refused_before_the_first_step(
        self, script, chain, tiny_configs, tmp_path, words, message
    ):
        inputs = ("--tokens", chain / "tokens", "--text-tokenizer", chain / "text")
        config = tiny_configs / "transformer" / "shapes.yaml"
        assert_refused(script("train_transformer", "--config", config, *inputs, *words), message)
        assert not (tmp_path / "runs").exists()

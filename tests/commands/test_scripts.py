"""Every command: missing stages are named, and mistakes are answered in one line."""

import os
import shutil
from pathlib import Path

import pytest

from dalle.runs import inputs as runs
from dalle.train.checkpoint import latest_checkpoint
from tests.helpers.refusals import assert_refused

PROJECT = Path(__file__).parents[2]
CONFIGS = PROJECT / "configs"


TINY_DVAE = ("--config", CONFIGS / "dvae" / "shapes.yaml")
TINY_TEXT = ("--config", CONFIGS / "transformer" / "shapes.yaml")
TINY_CLIP = ("--config", CONFIGS / "clip" / "shapes.yaml")
PROMPT = ("--prompt", "a red circle in the middle")


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
            os.utime(tmp_path / "runs" / name / "checkpoints", (1000 + i % 2, 1000 + i % 2))
        assert runs.latest_run("dvae") == Path("runs/quick/b")

    def test_unfinished_training_is_noted(self, chain, change_meta, tmp_path, capsys):
        shutil.copytree(chain / "dvae", tmp_path / "dvae")
        change_meta(latest_checkpoint(tmp_path / "dvae"), steps=100)
        runs.load_stage("dvae", tmp_path / "dvae")
        assert "2 of 100 steps only" in capsys.readouterr().out


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "words", "message"),
        [
            ("train_dvae", ("--seed", "1"), "--data.path"),
            ("train_dvae", ("--data.path", "nowhere"), "nowhere; give a folder"),
            ("train_dvae", ("--config", "nowhere.yaml"), r"no configuration file nowhere\.yaml"),
            ("train_dvae", (*TINY_DVAE, "--device", "gpu"), "unknown device 'gpu'"),
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

    def test_no_training_writes_into_a_token_cache(self, script, chain):
        assert_refused(script("train_dvae", *TINY_DVAE, "--out", chain / "tokens"), "is a token cache")

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
        assert_refused(script(name, *words), "cannot write (to )?file")

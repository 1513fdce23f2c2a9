"""The scripts: the chain as a user types it, the quick start, and mistakes told in one line.

The chain runs in fresh processes; the rest runs the scripts' files in this one.
"""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dalle import paths
from dalle.commands.evaluate import EvaluateArgs
from dalle.commands.quickstart import QuickstartArgs
from dalle.commands.train_dvae import train_dvae
from dalle.commands.train_tokenizer import train_tokenizer
from dalle.data import TokenCache
from dalle.hub.registry import load_model
from dalle.io.files import read_json
from dalle.pipelines.dalle import DALLE
from dalle.runs import inputs as runs
from dalle.runs import quickstart as stage
from dalle.train import trainer as loop
from dalle.train.checkpoint import latest_checkpoint

PROJECT = Path(__file__).parents[2]
CONFIGS = PROJECT / "configs"


# ---------------------------------------------------------------------------------------------
# The chain
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_configs, python) -> SimpleNamespace:
    """A directory where the five stages were run one after the other, and what each printed."""
    place, printed = tmp_path_factory.mktemp("workplace"), {}

    def run(name: str, family: str, *words) -> None:
        shipped, tiny = (folder / family / "shapes.yaml" for folder in (CONFIGS, tiny_configs))
        done = python([f"scripts/{name}.py", "--config", shipped, "--config", tiny, *words], cwd=place)
        assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
        printed[name] = done.stdout

    run("train_tokenizer", "transformer", "--captions", "2000")
    run("train_dvae", "dvae", "--train.batch-size", "6")
    run("encode_images", "dvae", "--encode.images", "20")
    run("train_transformer", "transformer", "--steps", "3")
    run("train_clip", "clip", "--seed", "1")
    return SimpleNamespace(path=place, printed=printed)


class TestChain:
    def test_each_stage_lies_under_its_name(self, workplace):
        assert sorted(path.name for path in (workplace.path / "runs").iterdir()) == [
            "clip",
            "dvae",
            "text",
            "tokens",
            "transformer",
        ]

    def test_words_won_over_both_files_and_the_second_file_over_the_first(self, workplace):
        metas = {
            kind: read_json(latest_checkpoint(workplace.path / "runs" / kind) / "meta.json")
            for kind in ("dvae", "transformer", "clip")
        }
        assert metas["dvae"]["config"]["train"]["batch_size"] == 6
        assert metas["dvae"]["model_config"]["widths"] == [4, 8, 8, 8]
        assert (metas["transformer"]["step"], metas["clip"]["config"]["seed"]) == (3, 1)
        assert TokenCache(workplace.path / "runs" / "tokens").size == 20

    def test_each_says_which_earlier_stage_it_took(self, workplace):
        printed = workplace.printed
        assert f"taking dvae from {Path('runs/dvae')}" in printed["encode_images"]
        assert f"taking tokens from {Path('runs/tokens')}" in printed["train_transformer"]
        assert f"taking text from {Path('runs/text')}" in printed["train_clip"]

    def test_sample_joins_what_lies_under_runs(self, workplace, python, prompt):
        words = ["--prompt", prompt, "--best-of", "4", "--num-images", "2", "--device", "cpu"]
        done = python(["scripts/sample.py", *words], cwd=workplace.path)
        assert done.returncode == 0, done.stderr
        (folder,) = (workplace.path / "runs" / "samples").iterdir()
        assert sorted(path.name for path in folder.iterdir()) == [
            "00.png",
            "01.png",
            "grid.png",
            "sample.json",
        ]
        assert Image.open(folder / "00.png").size == (32, 32)
        said = read_json(folder / "sample.json")
        assert (said["prompt"], said["best_of"], len(said["images"])) == (prompt, 4, 2)
        assert said["images"][0]["score"] >= said["images"][1]["score"]

    def test_evaluate_measures_a_model_directory(self, workplace, python):
        parts = (load_model(workplace.path / "runs" / kind, kind) for kind in ("dvae", "transformer", "clip"))
        model = DALLE.from_parts(*parts)
        model.save_pretrained(workplace.path / "model")
        words = ["--model", "model", "--num-prompts", "3", "--best-of", "2", "--json", "out/report.json"]
        done = python(["scripts/evaluate.py", *words, "--device", "cpu"], cwd=workplace.path)
        assert done.returncode == 0, done.stderr
        report = read_json(workplace.path / "out" / "report.json")
        assert report["model"] == model.hash
        for split in ("held_out", "new_pairs"):
            assert report["shapes"][split]["acc_real"] == 1.0


# ---------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------


class TestSample:
    @pytest.fixture
    def words(self, chain, prompt) -> list:
        return [
            "--model",
            chain / "model",
            "--prompt",
            prompt,
            "--best-of",
            "2",
            "--num-images",
            "1",
            "--device",
            "cpu",
        ]

    def test_it_never_writes_over_another_sample(self, script, words, tmp_path):
        for _ in range(3):
            assert script("sample", *words).code == 0
        names = sorted(path.name for path in (tmp_path / "runs" / "samples").iterdir())
        assert [name.removeprefix(names[0]) for name in names] == ["", "-2", "-3"]

    def test_a_directory_that_is_not_empty_is_refused(self, script, words, tmp_path):
        assert script("sample", *words, "--out", "mine").code == 0
        before = (tmp_path / "mine" / "00.png").read_bytes()
        again = script("sample", *words, "--out", "mine", "--seed", "5")
        assert (again.code, again.err) == (1, "error: mine is not empty; give another --out")
        assert (tmp_path / "mine" / "00.png").read_bytes() == before

    def test_a_failed_sample_leaves_no_directory(self, script, words, prompt, tmp_path):
        done = script("sample", *words, "--prompt", " and ".join([prompt] * 5))
        assert done.code == 1
        assert not (tmp_path / "runs").exists()

    def test_the_json_gives_the_images_back(self, script, words, chain, tmp_path):
        script("sample", *words, "--out", "mine", "--seed", "3", "--temperature", "0.7", "--top-k", "5")
        said = read_json(tmp_path / "mine" / "sample.json")
        model = DALLE.from_pretrained(chain / "model")
        assert said.pop("model") == model.hash
        (image,) = said.pop("images")
        again = model.to_precision(said.pop("precision")).generate(said.pop("prompt"), **said)
        assert again.candidates == [image["candidate"]]
        assert again.images[0].tobytes() == Image.open(tmp_path / "mine" / image["file"]).tobytes()

    def test_it_completes_a_image(self, script, words, tmp_path):
        Image.new("RGB", (40, 40), "red").save(tmp_path / "half.png")
        assert script("sample", *words, "--init-image", "half.png", "--out", "mine").code == 0
        assert read_json(tmp_path / "mine" / "sample.json")["rows"] == 2

    def test_it_writes_the_joined_parts_as_a_model_directory(self, script, words, chain, tmp_path):
        assert script("sample", *words, "--save-pretrained", "joined").code == 0
        assert DALLE.from_pretrained(tmp_path / "joined").hash == DALLE.from_pretrained(chain / "model").hash
        assert "None is given" in (tmp_path / "joined" / "README.md").read_text()

    def test_no_rows_are_refused(self, script, words, tmp_path):
        Image.new("RGB", (40, 40), "red").save(tmp_path / "half.png")
        done = script("sample", *words, "--init-image", "half.png", "--keep-rows", "0")
        assert (done.code, done.err) == (1, "error: rows must be 1 to 3, got 0")

    def test_parts_that_do_not_belong_together_are_refused(self, script, chain, tiny_runs, prompt, tmp_path):
        train_dvae(replace(tiny_runs.dvae, out=tmp_path / "other", seed=9))
        words = ["--transformer", chain / "transformer", "--clip", chain / "clip", "--prompt", prompt]
        done = script("sample", *words, "--dvae", "other", "--device", "cpu")
        assert done.code == 1
        assert re.match("error: .*do not belong together", done.err)


# ---------------------------------------------------------------------------------------------
# The quick start
# ---------------------------------------------------------------------------------------------


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
        scores = {
            "acc_real",
            "acc_mismatched",
            "acc_reconstruction",
            "acc_first",
            "acc_best_of_16",
            "acc_random_of_16",
            "acc_oracle_of_16",
            "acc_chance",
        }
        assert report["caption_accuracy"].keys() == report["caption_accuracy_new_pairs"].keys() == scores
        assert report["seconds"].keys() == {
            "tokenizer",
            "dvae",
            "encode",
            "transformer",
            "clip",
            "sample",
            "total",
        }
        assert report["codebook"].keys() == {"used", "perplexity"}
        assert report["caption_accuracy"]["acc_real"] == 1.0
        assert (report["seed"], report["captions"], report["best_of"]) == (0, 2, 16)
        model = DALLE.from_pretrained(out / "model")
        assert model.hash == report["model"]
        accuracy = report["caption_accuracy"]["acc_best_of_16"]
        assert (
            f"| caption_accuracy.acc_best_of_16 | {accuracy:.4g} |"
            in (out / "model" / "README.md").read_text()
        )
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

    def test_one_that_broke_off_goes_on(self, script, words, tmp_path, monkeypatch):
        """With the text tokenizer that the stages before were made with."""
        train_step, calls = loop.train_step, []

        def power_cut(state, *rest):
            calls.append(state.step)
            if len(calls) == 4:  # the dVAE took two steps, the transformer one
                raise KeyboardInterrupt
            return train_step(state, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", power_cut)
            done = script("quickstart", *words, "--best-of", "2")
        assert done.err == "stopped; the same command resumes a training from its last checkpoint"
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

    def test_the_transformer_makes_the_stages_it_lacks(self, script, tiny, tmp_path):
        done = script("train_transformer")
        assert done.code == 0, done.err
        assert "no arguments: using --config" in done.out
        made = [line for line in done.out.splitlines() if "training or encoding first" in line]
        assert [line.split()[1] for line in made] == ["text", "dvae", "tokens"]
        assert latest_checkpoint(tmp_path / "runs" / "transformer").name == "step-00000002"

    def test_the_transformer_takes_the_stages_there_are(self, script, tiny, chain, tmp_path):
        for name in ("text", "tokens", "dvae"):
            shutil.copytree(chain / name, tmp_path / "runs" / name)
        done = script("train_transformer")
        assert done.code == 0, done.err
        assert "training or encoding first" not in done.out

    def test_the_dvae_takes_its_preset(self, script, tiny, tmp_path):
        done = script("train_dvae")
        assert done.code == 0, done.err
        assert "no arguments: using --config" in done.out
        assert list((tmp_path / "runs" / "dvae").glob("reconstructions-*.png"))


# ---------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------

TINY_DVAE = ("--config", CONFIGS / "dvae" / "shapes.yaml")
TINY_TEXT = ("--config", CONFIGS / "transformer" / "shapes.yaml")
TINY_CLIP = ("--config", CONFIGS / "clip" / "shapes.yaml")
PROMPT = ("--prompt", "a red circle in the middle")


def assert_told(done: SimpleNamespace, said: str) -> None:
    """Exit status 1 and a sentence; a second line holds a command, if any."""
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    commands = done.err.strip().splitlines()[1:]
    assert all(line.startswith("    python scripts/") for line in commands)
    assert re.search(said, done.err), done.err


class TestMissingStages:
    @pytest.mark.parametrize(
        ("name", "words", "lacks"),
        [
            ("encode_images", TINY_DVAE, "dvae"),
            ("train_transformer", TINY_TEXT, "text"),
            ("train_clip", TINY_CLIP, "text"),
            ("sample", PROMPT, "dvae"),
        ],
    )
    def test_the_command_that_makes_it_is_named(self, script, name, words, lacks):
        done = script(name, *words)
        assert_told(done, rf"no {lacks} under runs/; make one:")
        assert done.err.splitlines()[1].strip() == runs.MAKE_COMMANDS[lacks]

    @pytest.mark.parametrize(
        ("found", "lacks"), [("text", "tokens"), ("dvae", "transformer"), ("transformer", "clip")]
    )
    def test_the_next_one_missing_is_named(self, script, chain, tmp_path, found, lacks):
        order = ["text", "tokens"] if lacks == "tokens" else ["dvae", "transformer", "clip"]
        for stage_name in order[: order.index(found) + 1]:
            shutil.copytree(chain / stage_name, tmp_path / "runs" / stage_name)
        name, words = ("train_transformer", TINY_TEXT) if lacks == "tokens" else ("sample", PROMPT)
        assert_told(script(name, *words), f"no {lacks} under runs/; make one:")

    @pytest.mark.parametrize("command", runs.MAKE_COMMANDS.values())
    def test_the_commands_named_exist(self, command):
        _, path, _, config = command.split()
        assert (PROJECT / path).is_file()
        assert (PROJECT / config).is_file()

    @pytest.mark.parametrize(
        ("name", "words", "option"),
        [
            ("encode_images", TINY_DVAE, "--dvae"),
            ("train_transformer", TINY_TEXT, "--text-tokenizer"),
            ("train_clip", TINY_CLIP, "--text-tokenizer"),
            ("sample", PROMPT, "--dvae"),
        ],
    )
    def test_a_path_that_is_not_there_is_named(self, script, name, words, option):
        assert_told(script(name, *words, option, "nowhere"), r"no (dvae|text) at nowhere; make one")

    def test_the_newest_of_several_is_taken(self, chain, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for i, name in enumerate(["a", "quick/b", "c"]):
            shutil.copytree(chain / "dvae", tmp_path / "runs" / name)
            pointer = tmp_path / "runs" / name / "checkpoints" / "latest"
            os.utime(pointer, (1000 + i % 2, 1000 + i % 2))
        assert runs.latest_run("dvae") == Path("runs/quick/b")

    def test_training_that_is_not_finished_is_noted(self, chain, change_meta, tmp_path, capsys):
        shutil.copytree(chain / "dvae", tmp_path / "dvae")
        change_meta(latest_checkpoint(tmp_path / "dvae"), steps=100)
        runs.load_stage("dvae", tmp_path / "dvae")
        assert "was trained for 2 of 100 steps only" in capsys.readouterr().out


class TestMistakes:
    @pytest.mark.parametrize(
        ("run", "settings"),
        [
            (EvaluateArgs, {"best_of": 0}),
            (EvaluateArgs, {"num_prompts": 0}),
            (QuickstartArgs, {"captions": 0}),
            (QuickstartArgs, {"best_of": -1}),
            (QuickstartArgs, {"temperature": -1.0}),
        ],
    )
    def test_numbers_that_mean_nothing_are_refused_before_any_work(self, run, settings):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be".replace("_", ".")):
            run(**settings)

    @pytest.mark.parametrize(
        ("name", "words", "said"),
        [
            ("train_dvae", ("--seed", "1"), "no data: give --data.path FOLDER"),
            ("train_dvae", ("--data.path", "nowhere"), "nothing lies at nowhere; give a folder"),
            ("train_dvae", ("--config", "nowhere.yaml"), r"no configuration file nowhere\.yaml"),
            ("train_dvae", (*TINY_DVAE, "--device", "gpu"), "unknown device 'gpu'; expected auto, cpu"),
            (
                "train_tokenizer",
                ("--data.path", "shapes", "--captions", "9", "--text.vocab-size", "200"),
                "too small",
            ),
            ("sample", (), "no prompt; give --prompt"),
            (
                "sample",
                (*PROMPT, "--best-of", "2", "--num-images", "3"),
                "best-of must be at least num-images",
            ),
            ("sample", (*PROMPT, "--model", "nowhere"), "nowhere is no model directory"),
            (
                "sample",
                (*PROMPT, "--model", "a", "--dvae", "b"),
                "--model holds every model; leave out --dvae",
            ),
            ("sample", (*PROMPT, "--keep-rows", "2"), "--keep-rows needs --init-image"),
            (
                "sample",
                (*PROMPT, "--prompts-file", "a.txt", "--out", "b"),
                "--prompts-file replaces --prompt",
            ),
            ("sample", ("--prompts-file", "a.txt"), "--prompts-file needs --out"),
            (
                "sample",
                ("--prompts-file", "a.txt", "--out", "b", "--init-image", "c.png"),
                "--init-image needs a single --prompt",
            ),
            ("sample", (*PROMPT, "--temperature", "-1"), "temperature must be 0"),
            ("sample", (*PROMPT, "--top-p", "2"), "top_p must be in"),
            ("sample", (*PROMPT, "--batch-size", "0"), "batch_size must be at least 1"),
            ("evaluate", ("--model", "nowhere"), "nowhere is no model directory"),
            ("quickstart", ("--configs", "nowhere"), "no configuration file"),
        ],
    )
    def test_they_are_told_in_one_line(self, script, name, words, said):
        assert_told(script(name, *words), said)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_device_that_is_not_there_is_named(self, script):
        assert_told(script("train_dvae", *TINY_DVAE, "--device", "cuda"), "this computer has no cuda")

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
    def test_a_place_that_cannot_be_written_is_named_before_any_work(self, script, tmp_path, name, words):
        (tmp_path / "file").write_text("in the way")
        assert_told(script(name, *words), "cannot write to file")

    def test_a_directory_without_a_text_tokenizer_is_named(self, script, tmp_path):
        (tmp_path / "empty").mkdir()
        assert_told(
            script("train_clip", *TINY_CLIP, "--text-tokenizer", "empty"),
            r"cannot read .*text_tokenizer\.json",
        )

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--model.grid", "5", "5"), r"has a grid of \[4, 4\], model\.grid is \[5, 5\]; set it"),
            (("--model.image-vocab", "8"), r"has 16 codes, model\.image_vocab is 8; set it"),
            (("--model.text-vocab", "300"), r"has \d+ ids, model\.text_vocab is 300; raise it"),
            (("--eval-samples", "24"), "has 24 images, eval_samples takes 24; lower it"),
        ],
    )
    def test_parts_that_do_not_fit_the_transformer_are_told_before_the_first_step(
        self, script, chain, tiny_configs, tmp_path, words, said
    ):
        inputs = ("--tokens", chain / "tokens", "--text-tokenizer", chain / "text")
        done = script(
            "train_transformer", "--config", tiny_configs / "transformer" / "shapes.yaml", *inputs, *words
        )
        assert_told(done, said)
        assert not (tmp_path / "runs").exists()

    def test_a_run_of_another_configuration_is_told(self, script, chain, tiny_configs, tmp_path):
        shutil.copytree(chain / "dvae", tmp_path / "runs" / "dvae")
        words = ("--config", tiny_configs / "dvae" / "shapes.yaml", "--train.batch-size", "5")
        assert_told(script("train_dvae", *words), r"another configuration \(train\.batch_size was 4, is 5\)")

"""The command `dalle`: its list is that of scripts/, its commands are those scripts, and it starts without torch."""

import runpy
import sys
from pathlib import Path

import pytest

import dalle
from dalle.cli import COMMANDS, GROUPS, listing, main, script_of
from dalle.config import ConfigError, read_yaml
from dalle.hub.registry import load_model
from dalle.paths import CONFIGS, as_typed, find_config

PROJECT = Path(__file__).parents[1]
SCRIPTS = sorted((PROJECT / "scripts").glob("*.py"))


def test_the_table_and_the_scripts_are_one_to_one():
    assert sorted(script_of(name) for name in COMMANDS) == SCRIPTS


def test_a_command_stands_in_one_group():
    assert sum(map(len, GROUPS.values())) == len(COMMANDS)


def test_the_list_has_one_line_for_each_and_fits_a_terminal():
    lines = listing().splitlines()
    assert max(map(len, lines)) <= 80
    for name, line in COMMANDS.items():
        assert [said for said in lines if said.split()[:1] == [name]] == [f"  {name:18}  {line}"]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == listing()


@pytest.mark.parametrize("words", ["--help", "--version", "trian-dvae"])
def test_torch_is_not_imported(words, python, tmp_path):
    code = (
        "import sys; from dalle.cli import main; code = main(sys.argv[1:]);"
        "print([name for name in ('torch', 'numpy', 'PIL', 'tyro') if name in sys.modules], code)"
    )
    done = python(["-c", code, words], cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == f"[] {2 if words.startswith('t') else 0}", done.stderr


def test_as_a_module(python, tmp_path):
    done = python(["-m", "dalle", "--version"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"dalle {dalle.__version__}\n")
    done = python(["-m", "dalle", "trian-dvae"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dalle: there is no command 'trian-dvae'; did you mean 'train-dvae'? " + (
        "`dalle --help` lists them all\n"
    )


def test_an_unknown_command_without_a_near_one(capsys):
    assert main(["zzz"]) == 2
    assert capsys.readouterr().err == "dalle: there is no command 'zzz'; `dalle --help` lists them all\n"


def said(call, capsys) -> tuple[object, str]:
    with pytest.raises(SystemExit) as stop:
        call()
    printed = capsys.readouterr()
    return stop.value.code, printed.out + printed.err


WORDS = {
    "benchmark": ["train", "--help"],
    "plan": ["--kind", "dvae", "--help"],
    "sweep": ["1", "--kind", "dvae", "--help"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_help_of_its_script(name, capsys, monkeypatch):
    words = WORDS.get(name, ["--help"])
    script = script_of(name)
    monkeypatch.setenv("COLUMNS", "500")  # no line is broken, so the two differ by names alone
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    code, text = said(lambda: runpy.run_path(str(script), run_name="__main__"), capsys)
    monkeypatch.setattr(sys, "argv", ["dalle"])
    code_here, text_here = said(lambda: main([name, *words]), capsys)
    assert code == code_here == 0
    assert f"usage: dalle {name} " in text_here
    assert "python scripts/" in text
    assert "python scripts/" not in text_here
    assert flags(text_here) == flags(text) != []


@pytest.mark.parametrize("name", WORDS)
def test_help_alone_explains_what_to_choose_first(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dalle"])
    code, text = said(lambda: main([name, "--help"]), capsys)
    assert code == 0
    assert f"\ndalle {name} " in text
    assert "--help after " in text


def flags(text: str) -> list[str]:
    """The words that a help explains, with their defaults."""
    return [line for line in map(str.strip, text.splitlines()) if line.startswith(("│ --", "--"))]


def test_a_command_trains_as_its_script(tiny_configs, tmp_path, monkeypatch, capsys):
    config = tiny_configs / "dvae" / "shapes.yaml"
    words = ["--config", str(config), "--out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_dvae.py", *words, "script"])
    runpy.run_path(str(script_of("train-dvae")), run_name="__main__")
    assert main(["train_dvae", *words, "command"]) == 0
    one, other = (load_model(tmp_path / name, "dvae").hash for name in ("script", "command"))
    assert one == other


def test_a_mistake_is_told_in_the_words_of_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dalle"])
    with pytest.raises(SystemExit, match=r"dalle train-dvae --config configs/dvae/shapes\.yaml"):
        main(["encode-images", "--config", "configs/dvae/shapes.yaml"])


class TestAsTyped:
    TEXT = "make one with python scripts/train_dvae.py --x\ntorchrun -n 8 scripts/encode_images.py; scripts/plan.py"

    def test_by_dalle(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["dalle train-dvae"])
        assert as_typed(self.TEXT) == (
            "make one with dalle train-dvae --x\ntorchrun -n 8 -m dalle encode-images; dalle plan"
        )

    @pytest.mark.parametrize("first", ["scripts/train_dvae.py", "/bin/dalle", "pytest", ""])
    def test_else_it_stays(self, first, monkeypatch):
        monkeypatch.setattr(sys, "argv", [first])
        assert as_typed(self.TEXT) == self.TEXT


class TestShippedConfigs:
    def test_are_taken_where_there_is_none_here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        name = Path("configs/dvae/shapes.yaml")
        assert find_config(name) == CONFIGS / "dvae" / "shapes.yaml"
        assert read_yaml(name) == read_yaml(CONFIGS / "dvae" / "shapes.yaml") != {}

    def test_the_one_here_wins(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        own = tmp_path / "configs" / "dvae" / "shapes.yaml"
        own.parent.mkdir(parents=True)
        own.write_text("steps: 7\n")
        assert read_yaml("configs/dvae/shapes.yaml") == {"steps": 7}

    @pytest.mark.parametrize(
        "name", ["dvae/shapes.yaml", "x/configs/dvae/shapes.yaml", "configs/../README.md"]
    )
    def test_no_other_path_is_looked_up(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert find_config(name) == Path(name)

    def test_a_mistyped_name_is_told_the_nearest(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            ConfigError, match=r"^no configuration file .*; did you mean configs/dvae/shapes\.yaml\?$"
        ):
            read_yaml("configs/dvae/shpes.yaml")
        with pytest.raises(
            ConfigError, match=r"shipped are configs/clip/clipart\.yaml, .*transformer/small\.yaml$"
        ):
            read_yaml("my.yaml")

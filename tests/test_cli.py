"""The command `dalle`: its commands are those of scripts/, and it starts without torch."""

import runpy
import sys
from pathlib import Path

import pytest

import dalle
from dalle.cli import COMMANDS, GROUPS, listing, main
from dalle.config import ConfigError, read_yaml
from dalle.hub.registry import load_model
from dalle.paths import CONFIGS, find_config

PROJECT = Path(__file__).parents[1]
SCRIPTS = {file.stem: file for file in (PROJECT / "scripts").glob("*.py")}
FIRST = {  # what comes before --help where a command has several forms
    "benchmark": ["train"],
    "plan": ["--kind", "dvae"],
    "lr-sweep": ["1", "--kind", "dvae"],
}


def test_one_name_for_command_script_and_module():
    modules = {file.stem for file in (PROJECT / "dalle" / "commands").glob("*.py")} - {"__init__"}
    assert {name.replace("-", "_") for name in COMMANDS} == SCRIPTS.keys() == modules


def test_each_command_has_one_line_that_fits_a_terminal():
    assert sum(map(len, GROUPS.values())) == len(COMMANDS)
    lines = listing().splitlines()
    assert max(map(len, lines)) <= 80
    for name, text in COMMANDS.items():
        assert [line for line in lines if line.split()[:1] == [name]] == [f"  {name:18}  {text}"]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == listing()


def test_as_a_module_without_torch(python, tmp_path):
    code = (
        "import sys; from dalle.cli import main;"
        "codes = [main([word]) for word in ('--help', '--version', 'trian-dvae')];"
        "print([name for name in ('torch', 'numpy', 'PIL', 'tyro') if name in sys.modules], codes)"
    )
    done = python(["-c", code], cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[] [0, 0, 2]", done.stderr
    assert "did you mean 'train-dvae'?" in done.stderr
    assert python(["-m", "dalle", "--version"], cwd=tmp_path).stdout == f"dalle {dalle.__version__}\n"


def test_an_unknown_command_without_a_near_one(capsys):
    assert main(["zzz"]) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_help_of_its_script(name, capsys, monkeypatch):
    words, script = [*FIRST.get(name, []), "--help"], str(SCRIPTS[name.replace("-", "_")])
    monkeypatch.setenv("COLUMNS", "500")  # no line is wrapped, so the two differ by the usage line alone
    texts = []
    for argv, call in [
        ([script, *words], lambda: runpy.run_path(script, run_name="__main__")),
        (["dalle"], lambda: main([name, *words])),
    ]:
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            call()
        assert not stop.value.code
        texts.append(capsys.readouterr().out)
    assert f"usage: dalle {name} " in texts[1]
    assert "python scripts/" in texts[0]
    assert options(texts[0]) == options(texts[1]) != []


@pytest.mark.parametrize("name", FIRST)
def test_help_alone_explains_what_to_choose_first(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dalle"])
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert not stop.value.code
    assert "--help after " in capsys.readouterr().out


def options(text: str) -> list[str]:
    """The options that a help explains, with their defaults."""
    return [line for line in map(str.strip, text.splitlines()) if line.startswith(("│ --", "--"))]


def test_a_command_trains_as_its_script(tiny_configs, tmp_path, monkeypatch):
    words = ["--config", str(tiny_configs / "dvae" / "shapes.yaml"), "--out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_dvae.py", *words, "script"])
    runpy.run_path(str(SCRIPTS["train_dvae"]), run_name="__main__")
    assert main(["train_dvae", *words, "command"]) == 0
    assert load_model(tmp_path / "script", "dvae").hash == load_model(tmp_path / "command", "dvae").hash


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

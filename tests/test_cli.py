"""The command `dalle`: its commands are those of scripts/, and it starts without torch."""

import runpy
import sys
from pathlib import Path

import pytest

import dalle
from dalle.cli import COMMANDS, GROUPS, listing, main
from dalle.config import CONFIGS, ConfigError, find_config, read_yaml

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
        "import sys; from dalle.cli import main; main(['--version']); main(['trian-dvae']);"
        "print([name for name in ('torch', 'numpy', 'PIL', 'tyro') if name in sys.modules])"
    )
    done = python(["-c", code], cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert python(["-m", "dalle", "--version"], cwd=tmp_path).stdout == f"dalle {dalle.__version__}\n"


@pytest.mark.parametrize(("word", "near"), [("trian-dvae", "did you mean 'train-dvae'"), ("zzz", None)])
def test_an_unknown_command(word, near, capsys):
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert near in error if near else "did you mean" not in error


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_help_of_its_script(name, capsys, monkeypatch):
    words, script = [*FIRST.get(name, []), "--help"], str(SCRIPTS[name.replace("-", "_")])
    monkeypatch.setenv("COLUMNS", "500")  # no line is wrapped
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


class TestShippedConfigs:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def test_a_file_in_the_current_directory_wins(self, tmp_path):
        name, own = Path("configs/dvae/shapes.yaml"), tmp_path / "configs" / "dvae" / "shapes.yaml"
        assert find_config(name) == CONFIGS / "dvae" / "shapes.yaml"
        assert read_yaml(name) == read_yaml(CONFIGS / "dvae" / "shapes.yaml") != {}
        own.parent.mkdir(parents=True)
        own.write_text("steps: 7\n")
        assert read_yaml(name) == {"steps": 7}

    @pytest.mark.parametrize(
        "name", ["dvae/shapes.yaml", "x/configs/dvae/shapes.yaml", "configs/../README.md"]
    )
    def test_no_other_path_is_looked_up(self, name):
        assert find_config(name) == Path(name)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("configs/dvae/shpes.yaml", r"did you mean configs/dvae/shapes\.yaml\?"),
            ("my.yaml", r"shipped are configs/clip/clipart\.yaml, .*transformer/small\.yaml"),
        ],
    )
    def test_a_wrong_name_gives_the_nearest_or_all(self, name, message):
        with pytest.raises(ConfigError, match=rf"no configuration file .*{message}$"):
            read_yaml(name)

"""The command `dalle`: its commands are those of scripts/, and help starts without torch."""

import json
import sys
from pathlib import Path

import pytest

import dalle
from dalle.cli import COMMANDS, GROUPS, listing, main
from dalle.config import CONFIGS, ConfigError, read_yaml

PROJECT = Path(__file__).parents[1]
FIRST = {  # what comes before --help where a command has several forms
    "benchmark": ["train"],
    "plan": ["--kind", "dvae"],
    "lr-sweep": ["1", "--kind", "dvae"],
}


def test_one_name_for_command_script_and_module():
    scripts, modules = ({f.stem for f in (PROJECT / x).glob("*.py")} for x in ("scripts", "dalle/commands"))
    assert {name.replace("-", "_") for name in COMMANDS} == scripts == modules - {"__init__"}


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


START = """
import contextlib, io, json, sys
from dalle.cli import main
for name, words in json.loads(sys.argv[1]).items():
    for more in (["--help"], ["--no-such-flag"], [*words, "--help"]):
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with quiet[0], quiet[1], contextlib.suppress(SystemExit):
            main([name, *more])
    heavy = {"torch", "numpy", "PIL", "matplotlib", "open_clip", "einops"} & sys.modules.keys()
    assert not heavy, f"{name} imports {heavy}"
"""


def test_help_and_bad_flags_import_nothing_heavy(python, tmp_path):
    words = {"trian-dvae": []} | {name: FIRST.get(name, []) for name in COMMANDS}
    done = python(["-c", START, json.dumps(words)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert python(["-m", "dalle", "--version"], cwd=tmp_path).stdout == f"dalle {dalle.__version__}\n"


@pytest.mark.parametrize(("word", "near"), [("trian-dvae", "did you mean 'train-dvae'"), ("zzz", None)])
def test_an_unknown_command(word, near, capsys):
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert near in error if near else "did you mean" not in error


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_help_of_its_script(name, script, capsys, monkeypatch):
    words = [*FIRST.get(name, []), "--help"]
    monkeypatch.setenv("COLUMNS", "500")  # no line is wrapped
    done = script(name.replace("-", "_"), *words)
    monkeypatch.setattr(sys, "argv", ["dalle"])
    with pytest.raises(SystemExit) as stop:
        main([name, *words])
    text = capsys.readouterr().out
    assert not done.code
    assert not stop.value.code
    assert f"usage: dalle {name} " in text
    assert "python scripts/" in done.out
    assert options(done.out) == options(text) != []
    if name in FIRST:
        with pytest.raises(SystemExit):
            main([name, "--help"])
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
        assert read_yaml(name) == read_yaml(CONFIGS / "dvae" / "shapes.yaml") != {}
        own.parent.mkdir(parents=True)
        own.write_text("steps: 7\n")
        assert read_yaml(name) == {"steps": 7}

    @pytest.mark.parametrize(
        "name", ["dvae/shapes.yaml", "x/configs/dvae/shapes.yaml", "configs/../README.md"]
    )
    def test_no_other_path_is_looked_up(self, name):
        with pytest.raises(ConfigError, match=rf"no configuration file {name}"):
            read_yaml(name)

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

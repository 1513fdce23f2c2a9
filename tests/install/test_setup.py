"""scripts/setup.sh in a small project, with stubs for all it calls: nothing is installed.

PATH is one folder of stubs. That of Python writes its commands to `log`, and its `-m venv` makes a .venv of
stubs.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "setup.sh"
TOOLS = ["cat", "chmod", "cksum", "cp", "dirname", "mkdir", "rm"]

PYTHON = """#!{sh}
case "$*" in
    *ensurepip*) [ ! -e "{bin}/no-venv" ] ;;
    *Python.h*) [ ! -e "{bin}/no-headers" ] ;;
    *version_info*) [ ! -e "{bin}/too-old" ] ;;
    *base_prefix*) echo "the base of {name}" ;;
    --version) echo "Python 3.9.2" ;;
    "-m venv "*)
        echo "venv" >>"{log}"
        rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python
        printf '#!{sh}\\necho "pip 1 from %s/.venv/lib (python 3)"\\n' "$PWD" >.venv/bin/pip
        printf '#!{sh}\\necho "uv $*" >>"{log}"\\n[ ! -e "{bin}/uv-fails" ]\\n' >.venv/bin/uv
        chmod +x .venv/bin/*
        ;;
    "-m pip "*) echo "$*" >>"{log}" ;;
esac
"""
FAILING = f"#!{shutil.which('sh')}\nexit 1\n"


class Project:
    """A copy of setup.sh next to a small pyproject.toml, and the folder of stubs that is its PATH."""

    def __init__(self, base: Path) -> None:
        self.root, self.bin, self.log = base / "a project", base / "bin", base / "log"
        (self.root / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(SETUP, self.root / "scripts")
        (self.root / "pyproject.toml").write_text("[project]\n")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.add("python3", PYTHON.format(sh=shutil.which("sh"), bin=self.bin, log=self.log, name="python3"))
        self.add("g++")
        self.add("make")

    def add(self, name: str, text: str = "") -> Path:
        file = self.bin / name
        file.write_text(text or f"#!{shutil.which('sh')}\n")
        file.chmod(0o755)
        return file

    def setup(self, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
        command = [shutil.which("sh"), str(self.root / "scripts" / "setup.sh")]
        env = {"PATH": str(self.bin), **env}
        options = {"cwd": cwd or self.root, "env": env, "timeout": 60}
        return subprocess.run(command, capture_output=True, text=True, **options)

    def commands(self) -> list[str]:
        """The first two words of each command since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [" ".join(line.split()[:2]) for line in lines]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def installed(project: Project) -> Project:
    """A project after its first setup."""
    assert project.setup().returncode == 0
    assert project.commands() == FULL
    return project


FULL = ["venv", "-m pip", "uv pip"]
MISSING = {
    "too-old": ("Python 3.11 or newer", "Python 3.9.2", "python3.11", "python3.11-venv", "python3.11-dev"),
    "python3": ("Python 3.11 or newer", "python3", "python3-venv", "python3-dev", "brew install python"),
    "no-venv": ("ensurepip", "python3-venv"),
    "no-headers": ("Python.h", "python3-dev", "python3-devel"),
    "g++": ("C++ compiler", "g++", "gcc-c++", "xcode-select --install"),
}


def remove(project: Project, thing: str) -> None:
    if thing in ("python3", "g++", "make"):
        (project.bin / thing).unlink()
    else:
        project.add(thing)


def assert_refused(project: Project, result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert project.commands() == []
    assert not (project.root / ".venv").exists()


@pytest.mark.parametrize("things", [*([thing] for thing in MISSING), ["no-venv", "no-headers", "g++"]])
def test_all_that_is_missing_is_named_and_nothing_is_made(project: Project, things: list[str]) -> None:
    for thing in things:
        remove(project, thing)
    result = project.setup()
    assert_refused(project, result, *(word for thing in things for word in MISSING[thing]))
    assert result.stderr.count("  - ") == len(things)
    if len(things) == 3:
        assert "sudo apt-get install python3-venv python3-dev g++\n" in result.stderr
        assert "sudo dnf install python3 python3-devel gcc-c++\n" in result.stderr


def test_a_compiler_or_interpreter_that_does_not_run_is_refused(project: Project) -> None:
    project.add("g++", FAILING)
    assert_refused(project, project.setup(), "C++ compiler")
    assert_refused(project, project.setup(PYTHON="nonesuch"), "nonesuch", "none that runs")
    project.add("c++")
    assert project.setup().returncode == 0


def test_a_newer_python_replaces_an_old_python3(project: Project) -> None:
    text = (project.bin / "python3").read_text()
    project.add("python3", FAILING)
    project.add("python3.12", text)
    assert project.setup().returncode == 0
    assert project.commands() == FULL


def test_the_second_run_does_nothing(installed: Project, tmp_path: Path) -> None:
    for thing in MISSING:  # not even the checks
        remove(installed, thing)
    second = installed.setup(cwd=tmp_path)
    assert (second.returncode, second.stdout) == (0, "setup: .venv is up to date\n")
    assert installed.commands() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "scripts/setup.sh"])
def test_a_change_installs_again_into_the_same_venv(installed: Project, name: str) -> None:
    with (installed.root / name).open("a") as file:
        file.write("# changed\n")
    for expected in (FULL[1:], []):
        assert installed.setup().returncode == 0
        assert installed.commands() == expected


def test_a_failed_install_is_tried_again_even_for_the_metadata_before_it(installed: Project) -> None:
    before = (installed.root / "pyproject.toml").read_text()
    (installed.root / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    failure = installed.add("uv-fails")
    for _ in range(2):
        assert installed.setup().returncode != 0
        assert installed.commands() == FULL[1:]
    failure.unlink()
    (installed.root / "pyproject.toml").write_text(before)  # .venv may hold packages of the other one
    assert installed.setup().returncode == 0
    assert installed.commands() == FULL[1:]


@pytest.mark.parametrize("change", ["broken", "moved"])
def test_a_broken_or_moved_venv_is_remade(installed: Project, tmp_path: Path, change: str) -> None:
    if change == "moved":
        installed.root = installed.root.rename(tmp_path / "elsewhere")
    else:
        for name in ("python", "pip"):  # as after an upgrade of the system's Python
            link = installed.root / ".venv" / "bin" / name
            link.unlink()
            link.symlink_to("gone")
    assert installed.setup().returncode == 0
    assert installed.commands() == FULL


def test_another_interpreter_remakes_the_venv(installed: Project) -> None:
    sh, project = shutil.which("sh"), installed
    other = project.add("another", PYTHON.format(sh=sh, bin=project.bin, log=project.log, name="another"))
    for env, expected in [({"PYTHON": str(other)}, FULL), ({"PYTHON": str(other)}, []), ({}, [])]:
        assert project.setup(**env).returncode == 0
        assert project.commands() == expected

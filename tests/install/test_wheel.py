"""What is given to others: what lies in the wheel and the sdist, and that the wheel works away from the
checkout.

The quick tests build from a copy of this tree and install the wheel alone into an environment that borrows
the packages of this one; the slow one lets pip fetch every dependency.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

import dalle
from dalle.cli import listing

PROJECT = Path(__file__).parents[2]
METADATA = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = """\
import sys
import hatchling.build as backend
hook, out = sys.argv[1:]
getattr(backend, f"build_{hook}")(out)
"""


def build(hook: str, tree: Path, out: Path) -> None:
    """Calls a hook of the build backend, as pip and `python -m build` do."""
    words = [sys.executable, "-c", BUILD, hook, str(out)]
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> SimpleNamespace:
    """The sdist of this tree and the wheel of that sdist, and the names in them: .wheel .sdist .in_wheel
    .in_sdist"""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    tree, out = tmp_path_factory.mktemp("tree") / "project", tmp_path_factory.mktemp("dist")
    parts = ["dalle", "configs", "scripts", "docs", "notebooks", "pyproject.toml", "LICENSE", "Makefile"]
    for name in [*parts, "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"]:
        source, target = PROJECT / name, tree / name
        tree.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        else:
            shutil.copy(source, target)
    (tree / "runs").mkdir()
    (tree / "runs" / "secret.json").write_text("{}")
    build("sdist", tree, out)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()} - {""}
        archive.extractall(out, filter="data")
    build("wheel", out / sdist.name.removesuffix(".tar.gz"), out)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    return SimpleNamespace(wheel=wheel, sdist=sdist, in_wheel=in_wheel, in_sdist=in_sdist)


def files(folder: str, *endings: str) -> set[str]:
    """Files of the tree, as paths from its root."""
    found = (
        path for path in (PROJECT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    return {
        path.relative_to(PROJECT).as_posix() for path in found if not endings or path.name.endswith(endings)
    }


class TestWheel:
    def test_its_name_has_the_version(self, built):
        assert built.wheel.name == f"zeroshot_text2image-{dalle.__version__}-py3-none-any.whl"
        assert METADATA["version"] == dalle.__version__

    def test_holds_all_of_the_package(self, built):
        assert files("dalle") <= built.in_wheel
        assert "dalle/py.typed" in built.in_wheel

    def test_holds_the_configurations_and_nothing_else(self, built):
        known = files("dalle") | {f"dalle/{name}" for name in files("configs", ".yaml")}
        assert known <= built.in_wheel
        assert {name for name in built.in_wheel if ".dist-info/" not in name} == known

    def test_metadata(self, built):
        with zipfile.ZipFile(built.wheel) as archive:
            folder = f"zeroshot_text2image-{dalle.__version__}.dist-info"
            said = message_from_bytes(archive.read(f"{folder}/METADATA"))
            assert archive.read(f"{folder}/licenses/LICENSE") == (PROJECT / "LICENSE").read_bytes()
            assert "dalle = dalle.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
        assert (said["Version"], said["License-Expression"]) == (dalle.__version__, "MIT")
        assert set(said.get_all("Provides-Extra")) == set(METADATA["optional-dependencies"])


class TestSdist:
    def test_has_what_a_wheel_is_built_of(self, built):
        assert files("dalle") | files("configs") | files("scripts", ".py", ".sh") <= built.in_sdist
        assert {"pyproject.toml", "LICENSE", "README.md"} <= built.in_sdist

    def test_has_the_pages(self, built):
        assert {
            "CHANGELOG.md",
            "CITATION.cff",
            "CONTRIBUTING.md",
            "docs/log.md",
            "docs/paper.md",
        } <= built.in_sdist
        assert {f"docs/{name}.md" for name in ("data", "limits", "scaling", "training")} <= built.in_sdist

    def test_has_neither_tests_nor_runs(self, built):
        assert {name.split("/")[0] for name in built.in_sdist} & {"tests", "runs", "build", ".venv"} == set()


# ---------------------------------------------------------------------------------------------
# Installed
# ---------------------------------------------------------------------------------------------


def run(words: list[str | Path], cwd: Path, seconds: float = 120) -> subprocess.CompletedProcess:
    """A program away from the checkout: nothing of this process's search path goes with it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env = kept | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds
    )


def fresh(folder: Path, *words: str) -> Path:
    """A new environment's folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", *words, folder], check=True, timeout=120)
    return folder / ("Scripts" if os.name == "nt" else "bin")


@pytest.fixture(scope="module")
def borrowed(built, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel in it, whose dependencies are those of this
    environment."""
    pytest.importorskip("pip", reason="pip installs the wheel")
    programs = fresh(tmp_path_factory.mktemp("borrowed") / "env", "--without-pip")
    site = Path(
        run(
            [programs / "python", "-c", "import site; print(site.getsitepackages()[0])"], programs
        ).stdout.strip()
    )
    words = [
        "--python",
        str(programs / "python"),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(built.wheel),
    ]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=120)
    # a line with a folder adds it, and leaves the .pth files in it unread: this checkout is not seen
    (site / "borrowed.pth").write_text("\n".join(places_of_packages()) + "\n")
    return programs


def places_of_packages() -> list[str]:
    """The folders that this process imports third-party packages from."""
    own = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return sorted(own | {place for place in sys.path if place.endswith("site-packages")})


class TestInstalled:
    def test_is_the_wheel(self, borrowed, tmp_path):
        code = "import dalle, dalle.config as shipped; print(dalle.__file__, shipped.CONFIGS, sep='\\n')"
        done = run([borrowed / "python", "-c", code], tmp_path)
        assert done.returncode == 0, done.stderr
        assert all(Path(line).is_relative_to(borrowed.parent) for line in done.stdout.splitlines())

    def test_help_and_version(self, borrowed, tmp_path):
        assert run([borrowed / "dalle", "--help"], tmp_path).stdout == listing() + "\n"
        assert run([borrowed / "dalle", "--version"], tmp_path).stdout == f"dalle {dalle.__version__}\n"
        assert run([borrowed / "dalle", "dance"], tmp_path).returncode == 2

    def test_trains_from_a_shipped_configuration(self, borrowed, tmp_path):
        words = ["--config", "configs/transformer/shapes.yaml", "--captions", "500"]
        done = run([borrowed / "dalle", "train-tokenizer", *words], tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "runs" / "text" / "text_tokenizer.json").is_file()

    @pytest.mark.slow
    def test_draws(self, borrowed, chain, prompt, tmp_path):
        draws(borrowed, chain, prompt, tmp_path)


def draws(programs: Path, chain: Path, prompt: str, place: Path) -> None:
    """`dalle sample` with the tiny model writes its images."""
    words = [
        "--model",
        chain / "model",
        "--prompt",
        prompt,
        "--best-of",
        "2",
        "--keep",
        "1",
        "--out",
        "drawn",
    ]
    done = run([programs / "dalle", "sample", *words, "--device", "cpu"], place)
    assert done.returncode == 0, done.stderr
    assert (place / "drawn" / "00.png").is_file()


@pytest.mark.slow
def test_a_clean_environment(built, chain, prompt, tmp_path):
    """As a stranger installs it: the steps of README.md, by uv where it is there (it keeps what it
    fetched)."""
    programs = fresh(tmp_path / "env")
    python = programs / "python"
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python]
    pip = uv if find_spec("uv") else [python, "-m", "pip", "install", "--quiet"]
    steps = (["cython", "setuptools", "wheel"], ["--no-build-isolation", "youtokentome"], [built.wheel])
    for words in steps:
        done = run([*pip, *words], tmp_path, seconds=1800)
        if words is steps[0] and done.returncode != 0:
            pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
    assert run([programs / "dalle", "--help"], tmp_path).stdout == listing() + "\n"
    draws(programs, chain, prompt, tmp_path)

"""Contents of the wheel and the sdist, and the wheel installed away from the checkout.

The fast tests install the wheel alone into an environment that borrows the packages of this one; the slow one
installs every dependency.
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


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> SimpleNamespace:
    """The wheel, built from the sdist of this tree, and the file names in both: .wheel .in_wheel .in_sdist"""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    tree, out = tmp_path_factory.mktemp("tree") / "project", tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "_build")
    for folder in ("dalle", "configs", "scripts", "docs", "notebooks", "tests"):
        shutil.copytree(PROJECT / folder, tree / folder, ignore=left_out)
    for file in filter(Path.is_file, PROJECT.glob("[!.]*")):
        shutil.copy(file, tree)
    (tree / "runs").mkdir()
    (tree / "runs" / "secret.json").write_text("{}")

    def build(target: str, tree: Path) -> None:
        words = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
        done = subprocess.run(words, cwd=tree, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    build("sdist", tree)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()} - {""}
        archive.extractall(out, filter="data")
    build("wheel", out / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    return SimpleNamespace(wheel=wheel, in_wheel=in_wheel, in_sdist=in_sdist)


def files(folder: str, *endings: str) -> set[str]:
    """Files of the tree, as paths from its root."""
    found = [path for path in (PROJECT / folder).rglob("*") if path.is_file()]
    names = {path.relative_to(PROJECT).as_posix() for path in found if "__pycache__" not in path.parts}
    return {name for name in names if not endings or name.endswith(endings)}


class TestWheel:
    def test_holds_the_package_and_the_configurations_alone(self, built):
        known = files("dalle") | {f"dalle/{name}" for name in files("configs", ".yaml")}
        assert "dalle/py.typed" in known
        assert {name for name in built.in_wheel if ".dist-info/" not in name} == known

    def test_metadata(self, built):
        assert built.wheel.name == f"zeroshot_text2image-{dalle.__version__}-py3-none-any.whl"
        with zipfile.ZipFile(built.wheel) as archive:
            folder = f"zeroshot_text2image-{dalle.__version__}.dist-info"
            metadata = message_from_bytes(archive.read(f"{folder}/METADATA"))
            assert archive.read(f"{folder}/licenses/LICENSE") == (PROJECT / "LICENSE").read_bytes()
            assert "dalle = dalle.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
        assert (metadata["Version"], metadata["License-Expression"]) == (dalle.__version__, "MIT")
        assert set(metadata.get_all("Provides-Extra")) == set(METADATA["optional-dependencies"])


def test_the_sdist_has_sources_and_pages_but_neither_tests_nor_runs(built):
    assert files("dalle") | files("configs") | files("scripts", ".py", ".sh") <= built.in_sdist
    assert {"pyproject.toml", "LICENSE", "README.md"} <= built.in_sdist
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"} <= built.in_sdist
    assert {"docs/log.md", "docs/paper.md", "docs/limits.md"} <= built.in_sdist
    assert not {name.split("/")[0] for name in built.in_sdist} & {"tests", "runs", "build", ".venv"}


# Installed.


def run(words: list[str | Path], cwd: Path, seconds: float = 120) -> subprocess.CompletedProcess:
    """A program with nothing of this process's search path."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env = kept | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": cwd, "env": env, "timeout": seconds}
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, **options)


def fresh(folder: Path, *words: str) -> Path:
    """A new environment's folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", *words, folder], check=True, timeout=120)
    return folder / ("Scripts" if os.name == "nt" else "bin")


@pytest.fixture(scope="module")
def borrowed(built, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel and the packages of this environment."""
    pytest.importorskip("pip", reason="pip installs the wheel")
    programs = fresh(tmp_path_factory.mktemp("borrowed") / "env", "--without-pip")
    python = programs / "python"
    code = "import site; print(site.getsitepackages()[0])"
    site = Path(run([python, "-c", code], programs).stdout.strip())
    words = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(built.wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=120)
    # a folder named in a .pth file is added without its own .pth files: this checkout stays unseen
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    folders |= {folder for folder in sys.path if folder.endswith("site-packages")}
    (site / "borrowed.pth").write_text("\n".join(sorted(folders)) + "\n")
    return programs


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
    def test_samples(self, borrowed, chain, prompt, tmp_path):
        sample(borrowed, chain, prompt, tmp_path)


def sample(programs: Path, chain: Path, prompt: str, folder: Path) -> None:
    """`dalle sample` with the tiny model writes its images."""
    words = ["--model", chain / "model", "--prompt", prompt, "--best-of", "2", "--num-images", "1"]
    done = run([programs / "dalle", "sample", *words, "--out", "images", "--device", "cpu"], folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "images" / "00.png").is_file()


@pytest.mark.slow
def test_a_clean_environment(built, chain, prompt, tmp_path):
    """The installation steps of the README, by uv where available (it caches)."""
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
    sample(programs, chain, prompt, tmp_path)

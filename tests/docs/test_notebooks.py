"""The notebooks: valid as shipped, and executed at a tiny size."""

import ast
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PROJECT = Path(__file__).parents[2]
BOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 2**20
MACHINE = re.compile(
    r"/(?:home|root|tmp|work|Users|usr|opt|var|mnt)/|[A-Z]:\\\\|0x[0-9a-fA-F]{6,}"
    r"|site-packages|https?://(?!arxiv)"
)
book = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    every = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in every if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def images(path: Path) -> list[Image.Image]:
    found = [output.get("data", {}).get("image/png") for output in outputs(path)]
    return [Image.open(io.BytesIO(base64.b64decode("".join(one)))) for one in found if one]


@book
def test_the_format_is_valid(path):
    nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    assert found.metadata.kernelspec.name == "python3"
    assert set(found.metadata) == {"kernelspec", "language_info"}
    assert all(cell.metadata == {} for cell in found.cells)


@book
def test_every_code_cell_was_run_in_order_without_errors_or_warnings(path):
    for number, cell in enumerate(cells(path, "code"), 1):
        assert cell["execution_count"] == number
        assert cell["outputs"], source(cell)
    assert {output["output_type"] for output in outputs(path)} <= {"stream", "display_data", "execute_result"}
    assert [output["text"] for output in outputs(path) if output.get("name") == "stderr"] == []


@book
def test_it_has_images_titles_and_text_and_names_no_path_of_a_machine(path):
    assert len(images(path)) >= 8
    for image in images(path):
        assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 3  # not blank
    assert path.stat().st_size < MOST_BYTES
    code, text = cells(path, "code"), cells(path, "markdown")
    assert source(text[0]).startswith(f"# {path.stem[0]}. ")
    assert len(text) > len(code) / 2
    assert max(len(line) for cell in code for line in source(cell).splitlines()) <= 120
    texts = [source(cell) for cell in (*code, *text)]
    for output in outputs(path):
        texts.append("".join(output.get("text", "")))
        texts += ["".join(shown) for mime, shown in output.get("data", {}).items() if mime[:5] == "text/"]
    assert [found for text in texts if (found := MACHINE.search(text))] == []


@book
def test_its_imports_exist(path):
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})


@book
def test_files_and_commands_in_its_text_exist(path):
    text = "\n".join(source(cell) for kind in ("code", "markdown") for cell in cells(path, kind))
    for name in re.findall(r"\b(?:scripts|configs|docs|dalle)/[\w/.-]*\w\.(?:py|md|yaml)\b", text):
        assert (PROJECT / name).is_file(), name
    targets = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= set(targets)


@pytest.mark.slow
@book
def test_it_runs_at_tiny_size(path, tmp_path, chain):
    for package in ("nbconvert", "ipykernel"):
        pytest.importorskip(package, reason="the extra `notebooks` is not installed")
    env = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    env |= {"NOTEBOOK_QUICKSTART": str(chain), "NOTEBOOK_SMALL": "1"}
    copy = Path(shutil.copy(path, tmp_path))
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(copy)]
    subprocess.run(command, env=env, check=True, timeout=900)
    assert len(images(copy)) == len(images(path))
    test_every_code_cell_was_run_in_order_without_errors_or_warnings(copy)

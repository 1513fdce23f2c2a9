"""The notebooks: whole as they are shipped, and run from top to bottom at a size of seconds."""

import ast
import base64
import importlib
import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from dalle.commands.notebooks import NotebooksRun, run_notebook, run_notebooks, tidy
from PIL import Image

PROJECT = Path(__file__).parents[2]
BOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
NAMES = ["1_caption_to_image", "2_train_three_stages", "3_look_inside", "4_your_data_and_checkpoints"]
MOST_BYTES = 1_500_000
MACHINE = re.compile(
    r"/(?:home|root|tmp|work|Users|usr|opt|var|mnt)/|[A-Z]:\\\\|0x[0-9a-f]{6,}|site-packages|https?://(?!arxiv)"
)
book = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind
    ]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def images(path: Path) -> list[Image.Image]:
    encoded = [
        output["data"]["image/png"] for output in outputs(path) if "image/png" in output.get("data", {})
    ]
    return [Image.open(io.BytesIO(base64.b64decode("".join(one)))) for one in encoded]


# ---------------------------------------------------------------------------------------------
# As they are shipped
# ---------------------------------------------------------------------------------------------


def test_all_four_are_there():
    assert [path.stem for path in BOOKS] == NAMES


@book
def test_the_format_is_valid(path):
    nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    assert found.metadata.kernelspec.name == "python3"
    assert set(found.metadata) == {"kernelspec", "language_info"}
    assert all(cell.metadata == {} for cell in found.cells)


@book
def test_every_code_cell_was_run_in_order_and_shows_something(path):
    for number, cell in enumerate(cells(path, "code"), 1):
        assert cell["execution_count"] == number
        assert cell["outputs"], source(cell)


@book
def test_nothing_failed_and_nothing_complained(path):
    assert {output["output_type"] for output in outputs(path)} <= {"stream", "display_data", "execute_result"}
    assert [output["text"] for output in outputs(path) if output.get("name") == "stderr"] == []


@book
def test_there_are_images_in_it_and_something_on_them(path):
    found = images(path)
    assert len(found) >= 8
    for image in found:
        assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 3


@book
def test_it_is_small_and_tells_nothing_of_the_machine(path):
    assert path.stat().st_size < MOST_BYTES
    text = [source(cell) for kind in ("code", "markdown") for cell in cells(path, kind)]
    for output in outputs(path):
        text.append("".join(output.get("text", "")))
        text += ["".join(told) for mime, told in output.get("data", {}).items() if mime.startswith("text/")]
    assert [found for one in text if (found := MACHINE.search(one))] == []


@pytest.mark.parametrize(
    "told",
    [
        *(f"wrote /{folder}/x.png" for folder in ("home", "tmp", "root", "Users")),
        "<PIL.Image at 0x7f3a2b1c>",
        "http://localhost:8888/lab",
        "lib/python3.11/site-packages/torch",
    ],
)
def test_what_tells_of_a_machine_is_found(told):
    assert MACHINE.search(told)


@book
def test_it_begins_with_a_title_and_text_stands_between_the_cells(path):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert source(found[0]).startswith(f"# {path.stem[0]}. ")
    assert len(cells(path, "markdown")) > len(cells(path, "code")) / 2
    assert max(len(line) for cell in cells(path, "code") for line in source(cell).splitlines()) <= 120


@book
def test_what_it_imports_is_there(path):
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


@book
def test_what_its_text_names_is_there(path):
    """Files and commands, also those in the text."""
    text = "\n".join(source(cell) for kind in ("code", "markdown") for cell in cells(path, kind))
    for name in re.findall(r"\b(?:scripts|configs|docs|dalle)/[\w/.-]*\w\.(?:py|md|yaml)\b", text):
        assert (PROJECT / name).is_file(), name
    targets = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= set(targets)


@book
def test_names_are_defined_before_they_are_used(path):
    """A reader who runs the cells from the top meets no NameError, and no cell leans on one further down."""
    known = set(dir(__builtins__) if not isinstance(__builtins__, dict) else __builtins__)
    for cell in cells(path, "code"):
        tree = ast.parse(source(cell))
        nodes = list(ast.walk(tree))
        bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        bound |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        bound |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
        bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
        aliases = [alias for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for alias in n.names]
        known |= bound | {(alias.asname or alias.name).split(".")[0] for alias in aliases}
        used = {n.id for n in nodes if isinstance(n, ast.Name)}
        assert used <= known, used - known


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def test_tidy_takes_out_what_differs_between_machines():
    nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")
    from nbformat import v4

    data = {"image/png": "AAAA", "image/jpeg": "BBBB", "text/plain": "<PIL.Image at 0x7f00>"}
    cell = v4.new_code_cell("x", metadata={"execution": {"iopub.execute_input": "2024-01-01"}})
    cell.outputs = [
        v4.new_output("display_data", data, metadata={"image/png": {"width": 3}}),
        v4.new_output("stream", text="said"),
    ]
    found = v4.new_notebook(
        cells=[cell], metadata={"widgets": {}, "language_info": {"name": "python", "version": "3.0"}}
    )
    tidy(found)
    nbformat.validate(found)
    assert "2024" not in json.dumps(found)
    assert "version" not in json.dumps(found)
    assert found.cells[0].outputs[0].data == {"image/png": "AAAA", "text/plain": "an image"}
    assert found.cells[0].outputs[1].text == "said"


def test_mistakes_are_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "made"
    (made / "model").mkdir(parents=True)
    (made / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no model at .*make quickstart"):
        run_notebooks(NotebooksRun())
    with pytest.raises(ValueError, match="no notebooks in notebooks/"):
        run_notebooks(NotebooksRun(quickstart=made))
    with pytest.raises(ValueError, match=r"no notebook at none\.ipynb"):
        run_notebooks(NotebooksRun((Path("none.ipynb"),), quickstart=made))
    with pytest.raises(ValueError, match="minutes must be positive"):
        NotebooksRun(minutes=0)


def test_help_teaches_by_examples(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/notebooks.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(PROJECT / "scripts" / "notebooks.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "python scripts/notebooks.py notebooks/1_caption_to_image.ipynb" in shown
    assert "--small" in shown


# ---------------------------------------------------------------------------------------------
# Run from the top
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch, chain) -> SimpleNamespace:
    """A project of notebooks alone: .path is its folder, .model what the quick start would have made."""
    for package in ("nbconvert", "ipykernel"):
        pytest.importorskip(package, reason="the extra `notebooks` is not installed")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    return SimpleNamespace(path=folder, model=chain)


@pytest.mark.slow
@book
def test_it_runs_from_the_top_at_tiny_size(path, place):
    copy = Path(shutil.copy(path, place.path))
    run_notebook(copy, place.model, small=True)
    assert len(images(copy)) == len(images(path))
    assert [source(cell) for cell in cells(copy, "code")] == [source(cell) for cell in cells(path, "code")]
    test_every_code_cell_was_run_in_order_and_shows_something(copy)
    test_nothing_failed_and_nothing_complained(copy)
    test_it_is_small_and_tells_nothing_of_the_machine(copy)


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_notebook_stays_as_it_was(place):
    from nbformat import v4, write

    path = place.path / "wrong.ipynb"
    write(v4.new_notebook(cells=[v4.new_code_cell("one = 1"), v4.new_code_cell("one + two")]), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"wrong\.ipynb: a cell failed: NameError: name 'two'.*\none \+ two"):
        run_notebook(path, place.model)
    assert path.read_bytes() == before

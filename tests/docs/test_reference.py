"""The generated reference: public names have docstrings, the site builds without a warning."""

import dataclasses
import runpy
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest

import dalle

PROJECT = Path(__file__).parents[2]


def own_docstring(thing: object) -> str:
    """The docstring as written, without the one that a dataclass makes up or a parent hands down."""
    if isinstance(thing, type):
        text = thing.__dict__.get("__doc__") or ""
        made_up = dataclasses.is_dataclass(thing) and text.startswith(f"{thing.__name__}(")
        return "" if made_up else text
    return thing.__doc__ or ""


@pytest.mark.parametrize("name", dalle.__all__)
class TestPublicNames:
    def test_is_told(self, name):
        assert len(own_docstring(getattr(dalle, name)).split()) >= 5

    def test_so_is_each_of_its_methods_and_properties(self, name):
        members = {
            key: value
            for key, value in vars(getattr(dalle, name)).items()
            if not key.startswith("_")
            and isinstance(value, property | classmethod | staticmethod | type(own_docstring))
        }
        untold = [key for key, value in members.items() if not own_docstring(value) and key != "forward"]
        assert untold == []


def test_the_index_links_every_page():
    index = (PROJECT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [path.name for path in (PROJECT / "docs").glob("*.md") if path.stem != "index"]
    assert [name for name in pages if f"({name})" not in index] == []


class TestDocstringsAsMarkup:
    @pytest.fixture
    def convert(self, monkeypatch):
        monkeypatch.setattr(sys, "path", [*sys.path])  # conf.py puts the checkout first
        conf = runpy.run_path(str(PROJECT / "docs" / "conf.py"))

        def convert(text: str, what: str = "function") -> str:
            lines = text.split("\n")
            conf["as_plain_text"](None, what, "name", None, None, lines)
            return "\n".join(lines)

        return convert

    def test_marks_are_no_markup(self, convert):
        assert convert("|x| and a * b of wide_ ones") == r"\|x\| and a \* b of wide\_ ones"

    def test_code_stays(self, convert):
        assert convert("the `layers.*|x_` of a_b") == "the `layers.*|x_` of a_b"

    def test_an_indented_block_is_shown_as_it_is(self, convert):
        assert (
            convert("So:\n\n    a | b\n    c * d\n\nand *on*")
            == "So:\n\n::\n\n    a | b\n    c * d\n\nand \\*on\\*"
        )

    def test_a_section_is_none(self, convert):
        text = "What.\n\nArgs:\n    x: one, over\n        two lines.\n\nReturns:\n    It."
        assert convert(text) == text

    def test_a_colon_in_a_field_is_no_type(self, convert):
        assert convert("What stands: the state.", "attribute") == "..\n\nWhat stands: the state."


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """As `make docs`; and the names that others link to are those of `dalle`."""
    for module in ("sphinx", "furo", "myst_parser"):
        if not find_spec(module):
            pytest.skip(f"{module} is not installed (dependency group docs)")
    words = [
        "-m",
        "sphinx",
        "-c",
        "docs",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        tmp_path / "trees",
        ".",
        tmp_path / "site",
    ]
    done = subprocess.run([sys.executable, *words], cwd=PROJECT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    objects = {line.split()[0]: line.split()[3] for line in inventory.splitlines() if " py:" in line}
    for name in dalle.__all__:
        assert objects[f"dalle.{name}"].startswith("docs/api/dalle.html")
    assert {"dalle.masks.visible", "dalle.transformer.losses.weighted_cross_entropy"} <= set(objects)
    page = (site / "docs" / "api" / "dalle.html").read_text(encoding="utf-8")
    assert "What stands for the image: the state of a class token" in page
    assert "docs/index.html" in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "docs" / "index.html").is_file()

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
    """The docstring without a dataclass's generated or a parent's inherited one."""
    if isinstance(thing, type):
        text = thing.__dict__.get("__doc__") or ""
        generated = dataclasses.is_dataclass(thing) and text.startswith(f"{thing.__name__}(")
        return "" if generated else text
    return thing.__doc__ or ""


@pytest.mark.parametrize("name", dalle.__all__)
def test_public_names_and_their_methods_have_docstrings(name):
    thing = getattr(dalle, name)
    assert len(own_docstring(thing).split()) >= 5
    kinds = property | classmethod | staticmethod | type(own_docstring)
    members = {key: value for key, value in vars(thing).items() if isinstance(value, kinds) and key[0] != "_"}
    assert [key for key, value in members.items() if not own_docstring(value) and key != "forward"] == []


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

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("|x| and a * b of wide_ ones", r"\|x\| and a \* b of wide\_ ones"),
            ("the `layers.*|x_` of a_b", None),
            ("So:\n\n    a | b\n    c * d\n\nand *on*", "So:\n\n::\n\n    a | b\n    c * d\n\nand \\*on\\*"),
            ("What.\n\nArgs:\n    x: one, over\n        two lines.\n\nReturns:\n    It.", None),
        ],
        ids=["plain text", "code", "indented block", "sections"],
    )
    def test_prose_is_escaped_and_code_is_kept(self, convert, text, expected):
        assert convert(text) == (expected or text)

    def test_a_colon_in_a_field_is_no_type(self, convert):
        assert convert("State: a vector.", "attribute") == "..\n\nState: a vector."


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """As `make docs`; and the names that others link to are those of `dalle`."""
    for module in ("sphinx", "furo", "myst_parser"):
        if not find_spec(module):
            pytest.skip(f"{module} is not installed (dependency group docs)")
    site = tmp_path / "site"
    words = ["-m", "sphinx", "-c", "docs", "-W", "--keep-going", "-q", "-d", tmp_path / "trees", ".", site]
    done = subprocess.run([sys.executable, *words], cwd=PROJECT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    objects = {line.split()[0]: line.split()[3] for line in inventory.splitlines() if " py:" in line}
    for name in dalle.__all__:
        assert objects[f"dalle.{name}"].startswith("docs/api/dalle.html")
    assert {"dalle.masks.visible", "dalle.transformer.losses.weighted_cross_entropy"} <= set(objects)
    assert "class token" in (site / "docs" / "api" / "dalle.html").read_text(encoding="utf-8")  # of a field
    assert "docs/index.html" in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "docs" / "index.html").is_file()

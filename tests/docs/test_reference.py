"""The generated reference: public names have docstrings, the site builds without a warning."""

import dataclasses
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
    page = (site / "docs" / "api" / "dalle.html").read_text(encoding="utf-8")
    assert "class token" in page  # of a field
    assert "heads * head_dim = 3968" in page  # no emphasis
    assert "docs/index.html" in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "docs" / "index.html").is_file()

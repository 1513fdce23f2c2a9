"""Sphinx: the pages of this project and the reference of its public names, as one site. `make docs` builds
it.

The source folder is the project's root, so that links between README.md, docs/ and the log lead where they
lead in the repository.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout is described, whatever is installed

from dalle import __version__

project = "zeroshot-text2image"
author = "the zeroshot-text2image authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/api/*.md"]
exclude_patterns = [".*", "runs", "shared", "dist", "build", "docs/_build"]

# Docstrings are plain text with `code`; their sections are Google's (Args, Returns, Raises). See
# `as_plain_text`
default_role = "code"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True  # as the source has them
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
add_module_names = False
smartquotes = False  # -- and " stay as they are typed
highlight_language = "text"  # of blocks that name none

myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {version}"
html_extra_path = ["site"]  # index.html, which leads to docs/index.html
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def as_plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Turns a docstring into markup that shows it as it reads: |x| and a * b as they are, indented blocks
    too."""
    # an empty comment in front keeps napoleon from reading "words: more words" of a field as its type
    told = ["..", ""] if what in ("attribute", "data", "property") else []
    literal = False
    for line in lines:
        if line and not line.startswith("    "):
            literal = False
        elif line and not literal and told[-1:] == [""]:  # a block of its own, not the words of a section
            literal = True
            told += ["::", ""]
        told.append(line if literal else _escaped(line))
    lines[:] = told


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(part if part.startswith("`") else re.sub(r"([*|]|_\b)", r"\\\1", part) for part in parts)


def with_colons(app, doctree) -> None:
    """Puts a colon between a parameter and its words, where Sphinx has two hyphens."""
    from docutils import nodes

    for text in [node for node in doctree.findall(nodes.Text) if node == " -- "]:
        text.parent.replace(text, nodes.Text(": "))


def setup(app) -> None:
    app.connect("autodoc-process-docstring", as_plain_text, priority=400)  # before napoleon's
    app.connect("doctree-read", with_colons)

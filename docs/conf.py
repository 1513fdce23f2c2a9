"""Sphinx configuration of the documentation: README, docs/, reference generated from dalle/ (`make docs`).

The source folder is the project's root, so that links between pages work as they do in the repository.
"""

import re
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # describes this checkout, whatever is installed

import dalle
from dalle import __version__

ROOT = Path(__file__).parents[1]

project = "zeroshot-text2image"
author = "the zeroshot-text2image authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/api/*.md"]
exclude_patterns = [".*", "runs", "shared", "dist", "build", "docs/_build"]

# Docstrings are plain text with `code`, their sections Google's (Args, Returns, Raises); see `as_plain_text`
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
    """Escape a docstring, so that |x|, a * b and indented blocks show as written."""
    # an empty comment in front keeps napoleon from reading "words: more words" of a field as its type
    markup = ["..", ""] if what in ("attribute", "data", "property") else []
    for paragraph in "\n".join(lines).split("\n\n"):
        rows = paragraph.split("\n")
        indented = all(row.startswith("    ") for row in rows)
        table = any(re.search(r"\S {3,}\S", row) for row in rows)
        if indented or table or rows[0].startswith(("python ", "torchrun ", "dalle ")):
            markup += ["::", "", *(row if indented else f"    {row}" for row in rows), ""]
        else:
            markup += [*map(_escaped, rows), ""]
    lines[:] = markup[:-1]


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]+`)", line)
    parts[::2] = [re.sub(r"([*|]|_\b)", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", "".join(parts))  # `layer`s


def with_colons(app, doctree) -> None:
    """Write a colon between a parameter and its description, where Sphinx has two hyphens."""
    from docutils import nodes

    for text in [node for node in doctree.findall(nodes.Text) if node == " -- "]:
        text.parent.replace(text, nodes.Text(": "))


def automodule(name: str, excluded: list[str]) -> str:
    """The section of one module, under the first line of its docstring."""
    title = (import_module(name).__doc__ or "").strip().split("\n")[0].rstrip(".")
    lines = [f"## {name}", "", title and f"{title}.", "", "```{eval-rst}", f".. automodule:: {name}"]
    lines += [f"   :exclude-members: {', '.join(excluded)}"] if excluded else []
    return "\n".join([*lines, "```", "", ""])


def write_reference(app=None) -> None:
    """Write docs/api/: a page of the public names, one for each package, one for the loose modules."""
    out = ROOT / "docs" / "api"
    out.mkdir(exist_ok=True)
    public = {name: getattr(dalle, name).__module__ for name in dalle.__all__}
    classes = "".join(
        f"## {name}\n\n```{{eval-rst}}\n.. autoclass:: dalle.{name}\n   :members:\n   :inherited-members: "
        "Module, Protocol\n```\n\n"
        for name in dalle.__all__
    )
    pages = {"dalle": f"# dalle: public names\n\nEach is imported as `from dalle import NAME`.\n\n{classes}"}
    for file in sorted((ROOT / "dalle").glob("**/*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if file.name.startswith("__"):
            continue
        package = file.parent.name if file.parent.name != "dalle" else "modules"
        if file.parent.parent.name == "external" or len(file.relative_to(ROOT).parts) > 3:
            package = file.relative_to(ROOT).parts[1]
        excluded = [key for key, module in public.items() if module == name]
        pages.setdefault(package, f"# dalle.{package}\n\n".replace("dalle.modules", "dalle: loose modules"))
        pages[package] += automodule(name, excluded)
    for name, text in pages.items():
        if not (out / f"{name}.md").is_file() or (out / f"{name}.md").read_text(encoding="utf-8") != text:
            (out / f"{name}.md").write_text(text, encoding="utf-8")


def setup(app) -> None:
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-process-docstring", as_plain_text, priority=400)  # before napoleon's
    app.connect("doctree-read", with_colons)

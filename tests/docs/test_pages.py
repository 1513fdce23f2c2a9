"""CITATION.cff, CHANGELOG.md and docs/limits.md: valid, of this version, consistent with the code."""

import datetime
import re
import tomllib
from pathlib import Path

from ruamel.yaml import YAML

import dalle
from dalle.commands.evaluate import EvaluateArgs
from dalle.data.config import FilterConfig

PROJECT = Path(__file__).parents[2]
METADATA = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_names_this_version_and_the_paper():
    """As the Citation File Format 1.2.0 requires."""
    citation = YAML(typ="safe", pure=True).load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert all(citation[key] for key in ("message", "title", "authors"))
    assert METADATA["version"] == dalle.__version__
    for key, name in (("title", "name"), ("version", "version"), ("license", "license")):
        assert citation[key] == METADATA[name]
    (paper,) = citation["references"]
    assert paper["title"] == "Zero-Shot Text-to-Image Generation"
    assert (paper["year"], paper["identifiers"][0]["value"]) == (2021, "arXiv:2102.12092")


def test_the_changelog_is_that_of_this_version():
    """In the form of Keep a Changelog."""
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, flags=re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    assert versions[1][0] == dalle.__version__
    days = [datetime.date.fromisoformat(day) for _, day in versions[1:]]
    assert days == sorted(days, reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE)) <= kinds


def test_each_script_and_switch_of_the_limits_exists():
    text = (PROJECT / "docs" / "limits.md").read_text(encoding="utf-8")
    for script in re.findall(r"scripts/\w+\.py", text):
        assert (PROJECT / script).is_file()
    assert "exclude_list" in FilterConfig.__dataclass_fields__
    switches = re.findall(r"`--([a-z.-]+)", text)
    known = {*EvaluateArgs.__dataclass_fields__, "data.filters.exclude_list"}
    assert switches
    assert {switch.replace("-", "_") for switch in switches} <= known

"""CITATION.cff, CHANGELOG.md and docs/limits.md: valid, of this version, and true where a machine can
tell."""

import datetime
import re
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import dalle
from dalle.commands.evaluate import EvaluateArgs
from dalle.data.config import FilterConfig

PROJECT = Path(__file__).parents[2]
METADATA = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version():
    assert METADATA["version"] == dalle.__version__


class TestCitation:
    """The rules of the Citation File Format 1.2.0 that this file could break."""

    @pytest.fixture
    def said(self) -> dict:
        return YAML(typ="safe", pure=True).load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))

    def test_has_what_the_format_asks_for(self, said):
        assert said["cff-version"] == "1.2.0"
        assert all(said[key] for key in ("message", "title", "authors"))
        assert said["type"] == "software"

    def test_is_of_this_software(self, said):
        assert (said["title"], said["version"], said["license"]) == (
            METADATA["name"],
            METADATA["version"],
            METADATA["license"],
        )
        assert said["authors"][0]["name"] in (PROJECT / "LICENSE").read_text(encoding="utf-8")

    def test_refers_to_the_paper(self, said):
        (paper,) = said["references"]
        assert paper["title"] == "Zero-Shot Text-to-Image Generation"
        assert paper["authors"][0] == {"given-names": "Aditya", "family-names": "Ramesh"}
        assert len(paper["authors"]) == 8
        assert (paper["year"], paper["identifiers"][0]["value"]) == (2021, "arXiv:2102.12092")
        assert paper["type"] == "conference-paper"


KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
"""What Keep a Changelog has headings for."""


class TestChangelog:
    TEXT = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")

    def test_the_newest_version_is_this_one(self):
        versions = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", self.TEXT, flags=re.MULTILINE)
        assert versions[0] == ("Unreleased", "")
        assert versions[1][0] == dalle.__version__
        days = [datetime.date.fromisoformat(day) for _, day in versions[1:]]
        assert days == sorted(days, reverse=True)

    def test_headings_are_the_forms(self):
        assert set(re.findall(r"^### (.+)$", self.TEXT, flags=re.MULTILINE)) <= KINDS


class TestLimits:
    TEXT = (PROJECT / "docs" / "limits.md").read_text(encoding="utf-8")

    def test_each_work_it_names_is_among_its_sources(self):
        prose, sources = self.TEXT.split("## Sources")
        named = re.findall(r"\b([A-Z][a-z]+)(?: et al\.)? ((?:19|20)\d\d)\b", prose)
        assert len(named) > 10
        for name, year in named:
            assert re.search(rf"^- {name}\b.*\b{year}\b", sources, flags=re.MULTILINE), (name, year)

    def test_each_source_is_named(self):
        prose, sources = self.TEXT.split("## Sources")
        for line in re.findall(r"^- (.+)", sources, flags=re.MULTILINE):
            assert line.split()[0].strip(",") in prose, line

    def test_each_script_and_switch_exists(self):
        for script in re.findall(r"scripts/\w+\.py", self.TEXT):
            assert (PROJECT / script).is_file()
        known = {*EvaluateArgs.__dataclass_fields__, "data.filters.exclude_list"}
        assert "exclude_list" in FilterConfig.__dataclass_fields__
        switches = re.findall(r"`--([a-z.-]+)", self.TEXT)
        assert switches
        assert {switch.replace("-", "_") for switch in switches} <= known
